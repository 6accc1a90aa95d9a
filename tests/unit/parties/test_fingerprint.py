"""The fingerprint: equal where it must be, and naming what differs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flower_split.config import LoraPartConfig, ModelConfig, RunConfig
from flower_split.errors import SplitError
from flower_split.parties.fingerprint import (
    differences,
    differing_fields,
    fingerprint,
    is_of_training,
    settings,
)
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(directory)
    return directory


def _config(directory: Path, **model: object) -> RunConfig:
    return RunConfig(model=ModelConfig(name=str(directory), first_cut=1, second_cut=3, **model))


def test_fingerprint_of_a_copy_elsewhere_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    content = json.loads((copy / "config.json").read_text())
    content["transformers_version"] = "0.0"
    (copy / "config.json").write_text(json.dumps(content))  # other layout, other version
    assert fingerprint(_config(checkpoint)) == fingerprint(_config(copy))


def test_fingerprint_of_other_weights_differs_in_weights(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    state = load_file(copy / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    mine, theirs = fingerprint(_config(checkpoint)), fingerprint(_config(copy))
    assert differing_fields(mine, theirs) == ["weights"]


def test_fingerprint_of_another_model_config_differs_in_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    content = json.loads((copy / "config.json").read_text())
    content["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(content))
    mine, theirs = fingerprint(_config(checkpoint)), fingerprint(_config(copy))
    assert differing_fields(mine, theirs) == ["model"]


def test_fingerprint_names_every_setting_that_differs(checkpoint: Path) -> None:
    config = _config(checkpoint)
    lora = replace(config.lora, top=LoraPartConfig(r=3))
    model = replace(config.model, second_cut=4, dtype="bfloat16", attn_implementation="eager")
    trunk = replace(config.trunk, wire_dtype="bfloat16")
    other = replace(config, mode="frozen", lora=lora, model=model, trunk=trunk)
    assert differing_fields(fingerprint(config), fingerprint(other)) == [
        "attention",
        "codec",
        "cut-layers",
        "dtype",
        "lora.top",
        "mode",
    ]


def test_fingerprint_ignores_what_is_each_partys_own(checkpoint: Path) -> None:
    config = _config(checkpoint)
    other = replace(
        config,
        train=replace(config.train, batch_size=3),
        trunk=replace(config.trunk, call_timeout=9.0, device="cpu", activation_memory=1.0),
    )
    assert fingerprint(config) == fingerprint(other)


def test_fingerprint_has_everything_by_which_the_trunk_trains() -> None:
    config = RunConfig()
    trunk, optimizer = config.trunk, config.trunk.optimizer
    others = {
        "seed": replace(config, seed=3),
        "codec": replace(config, trunk=replace(trunk, wire_dtype="bfloat16")),
        "gradient-codec": replace(config, trunk=replace(trunk, gradient_wire_dtype="int8")),
        "trunk.train": replace(config, trunk=replace(trunk, train="full")),
        "trunk.compute": replace(config, trunk=replace(trunk, compute="fast")),
        "trunk.num-threads": replace(config, trunk=replace(trunk, num_threads=2)),
        "trunk.reduction": replace(config, trunk=replace(trunk, reduction="median")),
        "trunk.max-client-grad-norm": replace(config, trunk=replace(trunk, max_client_grad_norm=1)),
        "trunk.on-bad-client": replace(config, trunk=replace(trunk, on_bad_client="abort")),
        "trunk.window-batches": replace(config, trunk=replace(trunk, window_batches="on")),
        "trunk.window-rule": replace(config, trunk=replace(trunk, window_rule="mine")),
    }
    for name, other in others.items():
        assert differing_fields(settings(config), settings(other)) == [name]
    optimizers = {
        "name": replace(optimizer, name="sgd"),
        "learning-rate": replace(optimizer, learning_rate=1e-9),
        "weight-decay": replace(optimizer, weight_decay=0.1),
        "max-grad-norm": replace(optimizer, max_grad_norm=0.5),
        "schedule": replace(optimizer, schedule="linear"),
    }
    for name, changed in optimizers.items():
        other = replace(config, trunk=replace(trunk, optimizer=changed))
        assert differing_fields(settings(config), settings(other)) == [f"trunk.optimizer.{name}"]
        assert is_of_training(f"trunk.optimizer.{name}")
    assert "trunk.optimizer.warmup-ratio" in settings(config)
    assert is_of_training("seed") and not is_of_training("weights") and not is_of_training("codec")


def test_a_gradient_codec_that_is_the_activations_own_is_no_field() -> None:
    trunk = replace(RunConfig().trunk, wire_dtype="int8", gradient_wire_dtype="int8")
    assert "gradient-codec" not in settings(RunConfig())  # which parties before it do not know
    assert "gradient-codec" not in settings(replace(RunConfig(), trunk=trunk))


def test_differences_name_both_values() -> None:
    text = differences({"a": "1", "b": "x"}, {"a": "2"}, ["a", "b"], labels=("run", "trunk"))
    assert text == "a (run: 1, trunk: 2); b (run: x, trunk: None)"


def test_fingerprint_of_a_sharded_checkpoint_needs_its_files(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    before = fingerprint(_config(tmp_path))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    state = load_file(shard)
    save_file({name: value + 1 for name, value in state.items()}, shard)
    assert differing_fields(before, fingerprint(_config(tmp_path))) == ["weights"]
    shard.unlink()
    with pytest.raises(SplitError, match=shard.name):
        fingerprint(_config(tmp_path))


def test_fingerprint_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"config\.json"):
        fingerprint(_config(tmp_path))


def test_differing_fields_counts_missing_ones() -> None:
    mine, theirs = {"a": "1", "b": "2"}, {"b": "3", "c": "4"}
    assert differing_fields(mine, theirs) == ["a", "b", "c"]
    assert differing_fields(mine, dict(mine)) == []
