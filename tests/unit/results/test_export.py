"""The exported adapter: plain PEFT on the plain base model computes what the split model does."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from flower_split.config import LoraConfigs, LoraPartConfig, ModelConfig, RunConfig, TrunkConfig
from flower_split.errors import RunDirectoryError
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.results.export import describe_export, export_adapter, portable_base
from flower_split.runs.directory import RunDirectory
from flower_split.split import CutLayers, load_client_model, load_trunk_model
from tests.support.tiny_models import padded_batch, tiny_model

CUTS = CutLayers(1, 3)
# PEFT itself reads a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SAME = LoraConfigs()
MIXED = LoraConfigs(
    bottom=LoraPartConfig(r=2, alpha=3.0, dropout=0.1),
    trunk=LoraPartConfig(r=4, alpha=5.0, use_rslora=True),
    top=LoraPartConfig(r=3, alpha=10.0),
)


def _trained(model: nn.Module, seed: int) -> None:
    """Give every LoRA weight a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    state = adapter_state(model)
    load_adapter_state(
        model, {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in state.items()}
    )


def _run(
    tmp_path: Path, family: str, lora: LoraConfigs, *, train: str = "lora", mode: str = "joint"
) -> tuple[RunConfig, nn.Module]:
    """A finished run's directory, and the split model that it ended with."""
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    config = RunConfig(
        model=ModelConfig(name=str(base), first_cut=CUTS.first, second_cut=CUTS.second),
        lora=lora,
        trunk=TrunkConfig(train=train),
        mode=mode,
        run_dir=str(tmp_path / "run"),
    )
    trunk = load_trunk_model(str(base), CUTS)
    client = load_client_model(str(base), CUTS, trunk)
    attach_lora(client, CUTS, {"bottom": lora.bottom, "top": lora.top}, seed=1)
    _trained(client, 1)
    run = RunDirectory.create(config)
    run.write_adapter("client", adapter_state(client))
    if mode == "joint" and train == "lora":
        attach_lora(trunk, CUTS, {"trunk": lora.trunk}, seed=1)
        _trained(trunk, 2)
        run.write_adapter("trunk", adapter_state(trunk))
    elif mode == "joint":
        torch.manual_seed(3)
        for parameter in trunk.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        run.write_adapter("trunk", {name: p.detach() for name, p in trunk.named_parameters()})
    return config, client


def _assert_peft_equals(config: RunConfig, client: nn.Module, out: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    plain = base(**padded_batch()).logits
    loaded = PeftModel.from_pretrained(base, str(out)).eval()
    expected = client.eval()(**padded_batch()).logits
    torch.testing.assert_close(loaded(**padded_batch()).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [SAME, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "mixtral"])
def test_export_loaded_by_peft_gives_the_split_models_logits(
    family: str, lora: LoraConfigs, tmp_path: Path
) -> None:
    config, client = _run(tmp_path, family, lora)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    _assert_peft_equals(config, client, out)


def test_export_of_different_targets_per_part_gives_the_same_logits(tmp_path: Path) -> None:
    lora = replace(
        MIXED,
        bottom=LoraPartConfig(r=2, target_modules="q_proj,v_proj"),
        top=LoraPartConfig(r=5, target_modules="down_proj", use_rslora=True),
    )
    config, client = _run(tmp_path, "llama", lora)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    _assert_peft_equals(config, client, out)
    content = json.loads((out / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in content["target_modules"]
    assert "model.layers.0.mlp.down_proj" not in content["target_modules"]


def test_export_config_names_rank_and_alpha_where_parts_differ(tmp_path: Path) -> None:
    _run(tmp_path, "llama", MIXED)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    content = json.loads((out / "adapter_config.json").read_text())
    # The trunk has most modules: its rank 4 and scale 5 / sqrt(4) are the adapter's own.
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (4, 10, False)
    assert content["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 2
    assert content["alpha_pattern"]["model.layers.0.self_attn.q_proj"] == 3
    assert content["rank_pattern"]["model.layers.3.mlp.up_proj"] == 3
    assert "model.layers.3.mlp.up_proj" not in content["alpha_pattern"]  # 10 as well
    assert len(content["rank_pattern"]) == 14
    assert content["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_of_a_trunk_trained_in_full_gives_the_same_logits(
    family: str, tmp_path: Path
) -> None:
    config, client = _run(tmp_path, family, SAME, train="full")
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    _assert_peft_equals(config, client, out)
    content = json.loads((out / "adapter_config.json").read_text())
    name = "model.layers" if family == "llama" else "transformer.h"
    assert content["modules_to_save"] == [f"{name}.1", f"{name}.2"]


def test_export_of_a_frozen_trunk_has_bottom_and_top_only(tmp_path: Path) -> None:
    config, client = _run(tmp_path, "llama", SAME, mode="frozen")
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    _assert_peft_equals(config, client, out)


def test_export_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    _run(tmp_path, "llama", SAME)
    (tmp_path / "run/adapters/trunk.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="did not finish"):
        export_adapter(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_into_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, "llama", SAME)
    with pytest.raises(RunDirectoryError, match="holds other files"):
        export_adapter(tmp_path / "run", tmp_path / "base")


def test_export_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    _run(tmp_path, "llama", MIXED)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    export_adapter(tmp_path / "run", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_export_names_a_local_base_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    config, _ = _run(tmp_path, "llama", SAME)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    moved = tmp_path / "elsewhere" / Path(config.model.name).name
    shutil.copytree(config.model.name, moved)
    name, _, digest = named.partition("@sha256:")
    assert name == moved.name and re.fullmatch("[0-9a-f]{64}", digest)
    assert portable_base(replace(config, model=replace(config.model, name=str(moved)))) == named
    (moved / "model.safetensors").write_bytes(b"other" + (moved / "model.safetensors").read_bytes())
    assert portable_base(replace(config, model=replace(config.model, name=str(moved)))) != named


def test_export_keeps_a_hub_id_and_a_name_that_is_given(tmp_path: Path) -> None:
    assert portable_base(RunConfig(model=ModelConfig(name="org/model"))) == "org/model"
    _run(tmp_path, "llama", SAME)
    out = export_adapter(tmp_path / "run", tmp_path / "out", base="org/other")
    content = json.loads((out / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "org/other"


def test_export_is_described_with_its_counts(tmp_path: Path) -> None:
    _run(tmp_path, "llama", SAME)
    out = export_adapter(tmp_path / "run", tmp_path / "out")
    state = load_file(out / "adapter_model.safetensors")
    text = describe_export(out)
    assert f"wrote {out}: adapter_model.safetensors ({len(state)} tensors" in text
    assert f"{sum(tensor.numel() for tensor in state.values()):,} parameters" in text
    assert "@sha256:" in text and "PeftModel.from_pretrained" in text


def test_export_of_a_run_with_an_unknown_aggregator_gives_a_sentence(tmp_path: Path) -> None:
    _run(tmp_path, "llama", SAME)
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "strategy.aggregator": "fedlt"}))
    with pytest.raises(RunDirectoryError, match=r"config.json: .*'fedlt'.*[Dd]id you mean 'fedit'"):
        export_adapter(tmp_path / "run", tmp_path / "out")
