"""Checkpoints whose configuration says that they are quantised."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.split.tiny import tiny_model


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
