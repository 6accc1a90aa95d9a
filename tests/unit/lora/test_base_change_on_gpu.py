"""A base change on CUDA, beside bases in half precision and in 4 and 8 bits."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from flower_split.aggregation import Factors
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
)
from flower_split.lora import adapter_state, attach_lora, load_adapter_state, lora_scales
from flower_split.lora.base_change import base_change_state, set_base_change
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.split import CutLayers, load_client_model, load_trunk_model, load_whole_model
from tests.support.tiny_models import padded_batch, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
CUTS = CutLayers(1, 3)
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LORA = LoraConfigs(
    bottom=LoraPartConfig(r=4, target_modules="up_proj,embed_tokens"),
    trunk=LoraPartConfig(r=4),
    top=LoraPartConfig(r=4, target_modules="down_proj,q_proj"),
)
BITS = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def filled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """LoRA values as after training; returns them."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.05
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return state


def random_change(model: nn.Module) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(9)
    changes = {}
    for name in lora_scales(model):
        layer = model.get_submodule(name)
        out, into = layer.out_features, layer.in_features
        if isinstance(layer.get_base_layer(), nn.Embedding):
            out, into = layer.get_base_layer().weight.shape
        b = torch.randn(out, 8, generator=generator) * 0.01
        changes[name] = Factors(torch.randn(8, into, generator=generator), b)
    return changes


def cuda_batch() -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in padded_batch().items()}


@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"),
    [
        ("float32", "", 1e-5),
        ("bfloat16", "", 2e-2),
        pytest.param("bfloat16", "bnb-4bit", 2e-2, marks=BITS),
        pytest.param("float16", "bnb-8bit", 2e-2, marks=BITS),
    ],
)
def test_base_change_on_a_gpu_is_computed_trained_through_and_exported(
    dtype: str, quantization: str, tolerance: float, tmp_path: Path
) -> None:
    tiny_model("llama", **WIDE).save_pretrained(tmp_path / "base")
    path, device = str(tmp_path / "base"), torch.device("cuda")
    config = RunConfig(
        model=ModelConfig(
            name=path, first_cut=1, second_cut=3, dtype=dtype, quantization=quantization
        ),
        lora=LORA,
        strategy=StrategyConfig(aggregator="flora"),
        run_dir=str(tmp_path / "run"),
    )
    quantised = quantization or None
    trunk = load_trunk_model(path, CUTS, dtype=dtype, device=device, quantization=quantised)
    client = load_client_model(
        path, CUTS, trunk, dtype=dtype, device=device, quantization=quantised
    )
    attach_lora(client, CUTS, {"bottom": LORA.bottom, "top": LORA.top}, seed=1)
    attach_lora(trunk, CUTS, {"trunk": LORA.trunk}, seed=1)
    run = RunDirectory.create(config)
    run.write_adapter("client", filled(client, 1))
    run.write_adapter("trunk", filled(trunk, 2))
    client.train(False)
    without = client(**cuda_batch()).logits.detach().float()

    changes = random_change(client)
    name = "model.layers.3.mlp.down_proj"
    layer = client.get_submodule(name).get_base_layer()
    x = torch.randn(4, layer.in_features, device=device).to(getattr(torch, dtype))
    before = layer(x).float()
    set_base_change(client, base_change_state(changes))
    run.write_adapter("base", base_change_state(changes))
    dense = (changes[name].B @ changes[name].A).cuda()
    expected = before + x.float() @ dense.T
    assert (layer(x).float() - expected).norm() <= tolerance * (x.float() @ dense.T).norm()

    output = client(**cuda_batch())
    output.loss.backward()
    gradients = [p.grad for p in client.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() and g.any() for g in gradients)

    out = export_adapter(run.path, tmp_path / "out")
    whole = load_whole_model(path, dtype=dtype, device=device, quantization=quantised)
    loaded = PeftModel.from_pretrained(whole, str(out)).eval()
    logits = loaded(**cuda_batch()).logits.detach().float()
    split = output.logits.detach().float()
    effect = (split - without).norm()
    assert effect > 0.2 * without.norm()
    assert (logits - split).norm() <= tolerance * split.norm()
