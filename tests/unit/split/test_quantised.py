"""Quantised bases: every part quantised as the whole model is, and trained through."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Mxfp4Config,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import LoraPartConfig, OptimizerConfig, RunConfig, parse_run_config
from flower_split.errors import ConfigError, SplitError
from flower_split.lora import adapter_state, attach_lora, initial_client_adapter, lora_scales
from flower_split.parties.fingerprint import fingerprint
from flower_split.split import (
    CutLayers,
    load_client_model,
    load_trunk_model,
    load_whole_model,
    split_model,
)
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from flower_split.split.loading import checkpoint as source_module
from flower_split.trunk.build import make_engine
from tests.support.checkpoints import set_quantization, write_fp8, write_mxfp4
from tests.support.tiny_models import (
    VOCAB_SIZE,
    assert_same_bits,
    loss_and_gradients,
    padded_batch,
    tiny_model,
)
from tests.support.toy_quantiser import METHOD, QUANTISED, ToyConfig, ToyLinear
from tests.support.trainer_rig import arguments
from tests.unit.split.test_loading import tensors_read  # noqa: F401  a fixture

CUTS = CutLayers(1, 3)
TOY = json.dumps({"quant_method": METHOD})
OLMO = OlmoConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    pad_token_id=0,
    eos_token_id=2,
)
LORA = {part: LoraPartConfig(r=2) for part in ("bottom", "trunk", "top")}
CLIENT_LORA = {part: LORA[part] for part in ("bottom", "top")}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    QUANTISED.clear()


def attach_lively_lora(whole: nn.Module, client: nn.Module, trunk: nn.Module) -> None:
    """LoRA with B away from zero, so that A has a gradient too."""
    attach_lora(whole, CUTS, LORA, seed=0)
    attach_lora(client, CUTS, CLIENT_LORA, seed=0)
    attach_lora(trunk, CUTS, {"trunk": LORA["trunk"]}, seed=0)
    for module in (whole, client, trunk):
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.05)


def linear_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers with LoRA."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def assert_parts_match(whole: nn.Module, client: nn.Module, trunk: nn.Module) -> dict[str, Tensor]:
    """Loss and every gradient, bit for bit; returns the gradients."""
    for module in (whole, client, trunk):
        module.train()
    loss, gradients = loss_and_gradients(whole, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "opt", "olmo"])
def test_quantised_parts_match_the_quantised_model_bitwise(
    family: str, dtype: str, tmp_path: Path
) -> None:
    # Olmo's norms have no weights: its trunk ends with a linear layer, which a rule of transformers
    # would keep whole if the trunk were a model of its own.
    model = OlmoForCausalLM(OLMO) if family == "olmo" else tiny_model(family)
    model.save_pretrained(tmp_path)
    path = str(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=ToyConfig())
    of_whole = sorted(QUANTISED)
    assert len(of_whole) >= 4 * 4
    QUANTISED.clear()
    trunk = load_trunk_model(path, CUTS, dtype=dtype, quantization=TOY)
    client = load_client_model(path, CUTS, trunk, dtype=dtype, quantization=TOY)
    # Nothing is quantised twice or by the wrong party, and what is kept whole is kept by all.
    assert sorted(QUANTISED) == of_whole
    attach_lively_lora(whole, client, trunk)
    gradients = assert_parts_match(whole, client, trunk)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_quantising_changes_the_model_and_reads_and_quantises_owned_tensors_only(
    tmp_path: Path,
    tensors_read: set[str],  # noqa: F811
) -> None:
    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path)
    inside = {n for n in model.state_dict() if ".layers.1." in n or ".layers.2." in n}
    trunk = load_trunk_model(str(tmp_path), CUTS, quantization=TOY)
    assert tensors_read == inside
    assert set(QUANTISED) == {name for name in inside if "norm" not in name}
    assert isinstance(trunk.get_submodule("model.layers.1.mlp.up_proj"), ToyLinear)
    tensors_read.clear()
    client = load_client_model(str(tmp_path), CUTS, trunk, quantization=TOY)
    assert tensors_read == set(model.state_dict()) - inside
    assert type(client.lm_head) is nn.Linear
    difference = client(**padded_batch()).logits - model(**padded_batch()).logits
    assert 0 < difference.abs().max() < 0.1


def test_adapter_of_a_quantised_client_is_named_as_that_of_a_plain_one(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    client = load_client_model(str(tmp_path), CUTS, IdentityTrunk(), quantization=TOY)
    attach_lora(client, CUTS, CLIENT_LORA, seed=3)
    state, scales = initial_client_adapter(str(tmp_path), CUTS, CLIENT_LORA, seed=3)
    own = adapter_state(client)
    assert own.keys() == state.keys() and lora_scales(client) == scales
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_quantised_model_in_memory_is_split_bitwise(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    whole = load_whole_model(str(tmp_path), quantization=ToyConfig())
    client, trunk = split_model(whole, CUTS)
    attach_lively_lora(whole, client, trunk)
    assert_parts_match(whole, client, trunk)


def test_checkpoint_that_is_quantised_is_read_as_it_is_from_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    whole = load_whole_model(str(tmp_path / "plain"), quantization=TOY)
    directory = tmp_path / "quantised"
    whole.save_pretrained(directory, max_shard_size="10KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.up_proj.weight_scale" in index
    fetched: list[str] = []

    def fetch(name_or_path: str, filename: str, revision: str | None) -> Path | None:
        path = directory / filename
        fetched.append(filename)
        return path if path.exists() else None

    def config(*args: object, **kwargs: object) -> LlamaConfig:
        return LlamaConfig.from_pretrained(directory)

    monkeypatch.setattr(source_module, "fetch", fetch)
    monkeypatch.setattr(source_module, "load_model_config", config)
    QUANTISED.clear()
    trunk = load_trunk_model("someone/quantised", CUTS)
    inside = {shard for n, shard in index.items() if ".layers.1." in n or ".layers.2." in n}
    outside = {s for n, s in index.items() if ".layers.1." not in n and ".layers.2." not in n}
    assert {name for name in fetched if name.startswith("model-")} == inside
    fetched.clear()
    client = load_client_model("someone/quantised", CUTS, trunk)
    assert {name for name in fetched if name.startswith("model-")} == outside
    assert outside - inside and inside - outside and not QUANTISED
    attach_lively_lora(whole, client, trunk)
    assert_parts_match(whole, client, trunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_checkpoint_is_dequantised_to_what_its_numbers_stand_for(
    dtype: str, tmp_path: Path
) -> None:
    meant = write_fp8(tmp_path)
    path, options = str(tmp_path), {"dtype": dtype, "quantization": "dequantize"}
    whole = load_whole_model(path, **options)
    trunk = load_trunk_model(path, CUTS, **options)
    client = load_client_model(path, CUTS, trunk, **options)
    for part in (trunk, client):
        for name, tensor in part.state_dict().items():
            torch.testing.assert_close(tensor, meant[name].to(getattr(torch, dtype)))
    assert len(trunk.state_dict()) == 2 * 9
    attach_lively_lora(whole, client, trunk)
    assert_parts_match(whole, client, trunk)


def test_mxfp4_checkpoint_dequantised_matches_the_whole_model_bitwise(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    path, options = str(tmp_path), {"dtype": "bfloat16", "quantization": "dequantize"}
    whole = AutoModelForCausalLM.from_pretrained(
        path, dtype="bfloat16", quantization_config=Mxfp4Config(dequantize=True)
    ).train()
    trunk = load_trunk_model(path, CUTS, **options).train()
    client = load_client_model(path, CUTS, trunk, **options).train()
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.bfloat16}
    loss, gradients = loss_and_gradients(whole, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "deaf"}, rf"{METHOD} .no gradient passes model\.layers\.\d"),
        ({"trainable": False}, f"{METHOD} .transformers says so"),
        ({"kind": "foreign"}, r"makes model\.layers\.\d\.self_attn\.q_proj a ForeignLinear"),
        ({"quant_method": "telepathy"}, "telepathy"),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["client", "trunk"])
def test_quantisation_that_cannot_train_is_refused_by_name(
    settings: dict[str, object], message: str, part: str, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    quantization = json.dumps({"quant_method": METHOD} | settings)
    with pytest.raises(SplitError, match=message):
        if part == "client":
            load_client_model(str(tmp_path), CUTS, IdentityTrunk(), quantization=quantization)
        else:
            load_trunk_model(str(tmp_path), CUTS, quantization=quantization)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "hqq", "quant_config": {}},
        {"quant_method": "telepathy"},
        {"bits": 4},
    ],
    ids=str,
)
def test_checkpoint_quantised_so_that_it_cannot_be_trained_here_is_refused(
    settings: dict[str, object], tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    set_quantization(tmp_path, settings)
    name = str(settings.get("quant_method", "without a quant_method"))
    with pytest.raises(SplitError, match=f"with quantisation {name}"):
        load_trunk_model(str(tmp_path), CUTS)


def test_quantisation_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    tiny_model("falcon").save_pretrained(tmp_path)  # whose linear layers are of a class of its own
    with pytest.raises(SplitError, match=f"{METHOD} changes no layer"):
        load_trunk_model(str(tmp_path), CUTS, quantization=TOY)


def test_quantising_what_is_quantised_or_dequantising_what_is_not_is_refused(
    tmp_path: Path,
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(SplitError, match="is not quantised"):
        load_trunk_model(str(tmp_path), CUTS, quantization="dequantize")
    set_quantization(tmp_path, {"quant_method": METHOD})
    with pytest.raises(SplitError, match=f"quantised already, with {METHOD}.*bnb-4bit"):
        load_trunk_model(str(tmp_path), CUTS, quantization="bnb-4bit")
    with pytest.raises(SplitError, match="does not dequantise while loading"):
        load_trunk_model(str(tmp_path), CUTS, quantization="dequantize")
    with pytest.raises(SplitError, match="must be one of bnb-8bit, bnb-4bit, dequantize"):
        tiny_model("llama").save_pretrained(tmp_path)
        load_trunk_model(str(tmp_path), CUTS, quantization="4bit")


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the library is there")
def test_quantisation_without_its_library_names_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    for name in ("bnb-4bit", "bnb-8bit"):
        with pytest.raises(SplitError, match=f"quantisation {name}.*requires bitsandbytes"):
            load_trunk_model(str(tmp_path), CUTS, quantization=name)


def test_attention_that_is_not_there_is_refused_with_a_remedy(tmp_path: Path) -> None:
    if find_spec("flash_attn") is not None:
        pytest.skip("flash attention is there")
    tiny_model("llama").save_pretrained(tmp_path)
    for name in ("flash_attention_2", "no_such_attention"):
        with pytest.raises(SplitError, match=r'attn-implementation to "sdpa" or "eager"'):
            load_trunk_model(str(tmp_path), CUTS, attn_implementation=name, dtype="bfloat16")


def _config(path: Path, quantization: str, **keys: object) -> RunConfig:
    return parse_run_config(
        {
            "model.name": str(path),
            "model.first-cut": 1,
            "model.second-cut": 3,
            "model.quantization": quantization,
            **keys,
        }
    )


def test_run_config_quantises_client_trunk_and_the_model_of_the_baseline(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = _config(tmp_path, TOY)
    client = Client(RunCache(config), 0, 2)
    assert isinstance(client.model.model.layers[0].mlp.up_proj.base_layer, ToyLinear)
    whole = client.kept.whole_model(client.own)[0]
    assert isinstance(whole.model.layers[1].mlp.up_proj.base_layer, ToyLinear)
    engine = make_engine(config)
    try:
        assert len(engine.adapter()) == 2 * 7 * 2
    finally:
        engine.close()
    with pytest.raises(ConfigError, match="quantised weights do not train"):
        make_engine(_config(tmp_path, TOY, **{"trunk.train": "full"}))


def test_fingerprint_names_the_quantisation(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    plain = fingerprint(_config(tmp_path, ""))
    one = fingerprint(_config(tmp_path, '{"quant_method": "x", "bits": 4}'))
    other = fingerprint(_config(tmp_path, '{"bits": 4, "quant_method": "x"}'))
    assert plain["quantization"] == "none" and one == other
    assert {name for name in plain if plain[name] != one[name]} == {"quantization"}


@pytest.mark.parametrize("value", ["4bit", "{broken", "[]"])
def test_run_config_with_a_quantisation_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        parse_run_config({"model.quantization": value})


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_bitsandbytes_parts_match_the_quantised_model_bitwise(
    family: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    # Rows of 64 and more: a block of 4-bit weights is 64 numbers.
    wide = {"n_embd": 64, "vocab_size": VOCAB_SIZE} if family == "gpt2" else {"hidden_size": 64}
    tiny_model(family, **wide).save_pretrained(tmp_path)
    options = {"dtype": dtype, "quantization": quantization}
    settings = {
        "bnb-8bit": {"load_in_8bit": True},
        "bnb-4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
    }[quantization]
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
    )
    trunk = load_trunk_model(str(tmp_path), CUTS, **options)
    client = load_client_model(str(tmp_path), CUTS, trunk, **options)
    kinds = {type(module).__module__.split(".")[0] for module in trunk.modules()}
    assert "bitsandbytes" in kinds and "bitsandbytes" in sys.modules
    attach_lively_lora(whole, client, trunk)
    assert {type(layer).__module__ for layer in linear_layers(trunk)} == {"peft.tuners.lora.bnb"}
    with torch.no_grad():  # which must not change how it trains
        client(**padded_batch())
    assert_parts_match(whole, client, trunk)


def test_quantised_client_trains_under_trainer_as_the_quantised_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    whole = load_whole_model(str(tmp_path), quantization=TOY)
    trunk = load_trunk_model(str(tmp_path), CUTS, quantization=TOY)
    client = load_client_model(str(tmp_path), CUTS, trunk, quantization=TOY)
    attach_lively_lora(whole, client, trunk)
    rows = [{"input_ids": [3 + i, 5, 7, 11 + i], "labels": [3 + i, 5, 7, 11 + i]} for i in range(4)]

    def one_step(model: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
        settings = arguments(tmp_path, OptimizerConfig(name="sgd", learning_rate=0.5), max_steps=1)
        trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows)
        return trainer.train().training_loss, adapter_state(model)

    before = adapter_state(client)
    loss, expected = one_step(whole)
    split_loss, found = one_step(client)
    assert split_loss == loss
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(torch.equal(found[name], before[name]) for name in found)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_bitsandbytes_checkpoint_is_read_as_it_is(quantization: str, tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "plain")
    whole = load_whole_model(str(tmp_path / "plain"), quantization=quantization)
    directory = tmp_path / "quantised"
    whole.save_pretrained(directory, max_shard_size="40KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("layers.1.mlp.up_proj.weight." in name or "SCB" in name for name in index)
    trunk = load_trunk_model(str(directory), CUTS)
    client = load_client_model(str(directory), CUTS, trunk)
    attach_lively_lora(whole, client, trunk)
    assert_parts_match(whole, client, trunk)
