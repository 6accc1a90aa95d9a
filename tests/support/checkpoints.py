"""Checkpoints whose configuration says that they are quantised."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from tests.support.tiny_models import VOCAB_SIZE, tiny_model


def write_fp8(path: Path, **changes: object) -> dict[str, Tensor]:
    """A checkpoint in blockwise 8-bit floats; returns what its weights stand for."""
    tiny_model("llama", **changes).save_pretrained(path)
    state, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".layers." in name and "norm" not in name:
            rows, columns = tensor.shape
            scale = 0.5 + torch.rand(rows // 8, columns // 8, generator=generator)
            state[name] = (tensor * 4).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale
            blocks = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
            meant[name] = state[name].float() * blocks
        else:
            state[name] = meant[name] = tensor
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    set_quantization(path, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    return meant


def set_quantization(path: Path, settings: dict[str, object]) -> None:
    """Let a checkpoint's configuration say that it is quantised."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))


def write_mxfp4(path: Path) -> None:
    """A tiny mixture of experts whose experts are in 4-bit floats of one scale for 32 numbers."""
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(path)
    state = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)  # 2 ** (120 - 127)
        else:
            state[name] = tensor.bfloat16()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    set_quantization(
        path,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["self_attn", "mlp.router", "embed_tokens", "lm_head"],
        },
    )
