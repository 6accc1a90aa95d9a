"""The exported adapter of a run whose method changed the base, loaded by plain PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flower_split.aggregation import Factors
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
)
from flower_split.errors import RunDirectoryError, SplitError
from flower_split.lora import adapter_state, attach_lora, load_adapter_state, lora_scales
from flower_split.lora.base_change import base_change_state, set_base_change, with_base_change
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.split import (
    CutLayers,
    load_client_model,
    load_trunk_model,
    load_whole_model,
)
from tests.support.tiny_models import padded_batch, tiny_model
from tests.support.toy_quantiser import METHOD, ToyLinear
from tests.unit.lora.test_base_change import random_change

CUTS = CutLayers(1, 3)
# PEFT itself reads a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = {
    "llama": ("up_proj,embed_tokens", "down_proj,lm_head"),
    "gpt2": ("c_fc,c_attn", "c_proj"),  # Conv1D
}


def finished_run(
    tmp_path: Path,
    family: str,
    dtype: str = "float32",
    scale: float = 0.2,
    quantization: str = "",
) -> tuple[RunConfig, PreTrainedModel]:
    """A run's directory without its base change, and the split model that it ended with."""
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    bottom, top = TARGETS[family]
    lora = LoraConfigs(
        bottom=LoraPartConfig(r=2, alpha=3.0, target_modules=bottom),
        trunk=LoraPartConfig(r=4, alpha=5.0, use_rslora=True),
        top=LoraPartConfig(r=3, alpha=10.0, target_modules=top),
    )
    config = RunConfig(
        model=ModelConfig(
            name=str(base), first_cut=1, second_cut=3, dtype=dtype, quantization=quantization
        ),
        lora=lora,
        strategy=StrategyConfig(aggregator="fedex-lora"),
        run_dir=str(tmp_path / "run"),
    )
    quantised = quantization or None
    trunk = load_trunk_model(str(base), CUTS, dtype=dtype, quantization=quantised)
    client = load_client_model(str(base), CUTS, trunk, dtype=dtype, quantization=quantised)
    attach_lora(client, CUTS, {"bottom": lora.bottom, "top": lora.top}, seed=1)
    attach_lora(trunk, CUTS, {"trunk": lora.trunk}, seed=1)
    run = RunDirectory.create(config)
    generator = torch.Generator().manual_seed(5)
    for name, model in (("client", client), ("trunk", trunk)):
        state = adapter_state(model)
        random = {n: torch.randn(t.shape, generator=generator) * scale for n, t in state.items()}
        load_adapter_state(model, random)
        run.write_adapter(name, random)
    return config, client.eval()


def change_base(config: RunConfig, client: nn.Module, changes: dict[str, Factors]) -> None:
    state = base_change_state(changes)
    set_base_change(client, state)
    RunDirectory.open(config.run_dir).write_adapter("base", state)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**padded_batch()).logits
    return logits.float()


def exported(config: RunConfig, tmp_path: Path) -> nn.Module:
    out = export_adapter(Path(config.run_dir), tmp_path / "out")
    base = load_whole_model(
        config.model.name,
        dtype=config.model.dtype,
        quantization=config.model.quantization or None,
    )
    return PeftModel.from_pretrained(base, str(out)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_holds_the_base_change_as_well(family: str, tmp_path: Path) -> None:
    config, client = finished_run(tmp_path, family)
    without = logits_of(client)
    change_base(config, client, random_change(client, 3, rank=7))
    expected = logits_of(client)
    torch.testing.assert_close(
        logits_of(exported(config, tmp_path)), expected, rtol=1e-5, atol=1e-5
    )
    assert (expected - without).abs().max() > 0.1
    content = json.loads((tmp_path / "out/adapter_config.json").read_text())
    ranks = {content["rank_pattern"].get(name, content["r"]) for name in lora_scales(client)}
    assert ranks == {2 + 7, 3 + 7}


def test_base_change_stands_beside_a_quantised_base_and_is_exported(tmp_path: Path) -> None:
    config, client = finished_run(
        tmp_path, "llama", quantization=json.dumps({"quant_method": METHOD})
    )
    name = "model.layers.3.mlp.down_proj"
    base = client.get_submodule(name).get_base_layer()
    assert isinstance(base, ToyLinear)
    codes, x = base.weight.clone(), torch.randn(2, 5, base.in_features)
    before = base(x).double()
    changes = random_change_of(client, 3)
    change_base(config, client, changes)
    dense = changes[name].B.double() @ changes[name].A.double()
    torch.testing.assert_close(
        base(x).double(), before + x.double() @ dense.T, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(base.weight, codes)
    expected = logits_of(client)
    torch.testing.assert_close(
        logits_of(exported(config, tmp_path)), expected, rtol=1e-5, atol=1e-5
    )


def random_change_of(model: nn.Module, seed: int) -> dict[str, Factors]:
    """A change of every LoRA module, from its own sizes: quantised weights have none to tell."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in lora_scales(model):
        layer = model.get_submodule(name)
        out, into = layer.out_features, layer.in_features
        if isinstance(layer.get_base_layer(), nn.Embedding):
            out, into = layer.get_base_layer().weight.shape
        a = torch.randn(2, into, generator=generator)
        changes[name] = Factors(a, torch.randn(out, 2, generator=generator) * 0.02)
    return changes


def test_export_without_the_file_of_the_base_change_is_refused(tmp_path: Path) -> None:
    config, _ = finished_run(tmp_path, "llama")
    with pytest.raises(RunDirectoryError, match=r"base\.safetensors is missing"):
        export_adapter(Path(config.run_dir), tmp_path / "out")


def test_export_on_a_bfloat16_base_keeps_what_a_hundred_merges_lose(tmp_path: Path) -> None:
    config, client = finished_run(tmp_path, "llama", "bfloat16", scale=0.0)
    name, rounds = "lm_head", 100
    base = client.get_submodule(name).get_base_layer()
    std = float(base.weight.float().std())
    torch.manual_seed(4)
    step = Factors(torch.randn(1, 32), torch.randn(64, 1) * std * 15e-4)
    plain = logits_of(client)
    change_base(config, client, {name: Factors(step.A, step.B, float(rounds))})
    beside, plain_peft = logits_of(client), logits_of(exported(config, tmp_path))

    def dense(dtype: torch.dtype) -> Tensor:
        """The unsplit model; every round's step is added to its weight in ``dtype``."""
        model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.bfloat16)
        model = model.to(dtype).eval()
        weight = model.get_submodule(name).weight.data
        for _ in range(rounds):
            weight += (step.B.double() @ step.A.double()).to(dtype)
        return logits_of(model)

    exact, merged = dense(torch.float32), dense(torch.bfloat16)
    effect = float((exact - plain).norm())
    assert float((beside - exact).norm()) < 0.1 * effect  # rounding of activations
    assert float((plain_peft - beside).norm()) < 0.1 * effect
    assert float((merged - exact).norm()) > 0.5 * effect


def test_with_base_change_of_the_opposite_leaves_the_adapter_as_it_was(tmp_path: Path) -> None:
    _, client = finished_run(tmp_path, "llama")
    name = "model.layers.3.mlp.down_proj"
    state, scales = adapter_state(client), lora_scales(client)
    a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    change = base_change_state({name: Factors(a, -b, scales[name])})
    whole, new_scales = with_base_change(state, scales, change)
    product = whole[f"{name}.lora_B.weight"] @ whole[f"{name}.lora_A.weight"] * new_scales[name]
    assert product.norm() < 1e-6 * (b @ a).norm()
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[n], state[n]) for n in state if not n.startswith(name))


def test_with_base_change_of_another_model_is_refused(tmp_path: Path) -> None:
    _, client = finished_run(tmp_path, "llama")
    for name, wide in (("model.layers.3.mlp.down_proj", 31), ("model.layers.0.x", 48)):
        change = base_change_state({name: Factors(torch.ones(1, wide), torch.ones(32, 1))})
        with pytest.raises(SplitError, match="does not fit"):
            with_base_change(adapter_state(client), lora_scales(client), change)
