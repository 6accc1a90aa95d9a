"""The models of the benchmarks: Llamas of some size with random weights, and their batches."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flower_split.training.loss import Batch

RANK, ALPHA = 16, 32  # of LoRA, on all linear modules of the layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model and a batch."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    cuts: tuple[int, int]
    batch: int
    sequence: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


PRESETS = {
    "tiny": Preset(
        hidden=128,
        layers=8,
        heads=4,
        intermediate=352,
        vocab=2048,
        cuts=(2, 6),
        batch=8,
        sequence=128,
        dtype="float32",
    ),
    "small": Preset(
        hidden=768,
        layers=12,
        heads=12,
        intermediate=2048,
        vocab=32000,
        cuts=(2, 10),
        batch=8,
        sequence=128,
        dtype="float32",
    ),
    "1b": Preset(
        hidden=2048,
        layers=16,
        heads=16,
        intermediate=5632,
        vocab=32000,
        cuts=(1, 15),
        batch=8,
        sequence=512,
        dtype="bfloat16",
    ),
    "7b": Preset(
        hidden=4096,
        layers=32,
        heads=32,
        intermediate=11008,
        vocab=32000,
        cuts=(2, 30),
        batch=8,
        sequence=512,
        dtype="bfloat16",
    ),
}


def write_checkpoint(preset: Preset, path: Path, device: str, kv_heads: int = 0) -> None:
    """Write a Llama of the preset's size with random weights.

    Args:
        preset: The size.
        path: A directory.
        device: On which it is made: a CPU takes minutes for the large ones.
        kv_heads: Key-value heads; 0: as many as there are heads.
    """
    config = AutoConfig.for_model(
        "llama",
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=kv_heads or preset.heads,
        intermediate_size=preset.intermediate,
        vocab_size=preset.vocab,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=preset.torch_dtype
        )
    model.save_pretrained(path)


def random_batches(preset: Preset, rows: int, count: int, seed: int) -> list[Batch]:
    """Return batches of random tokens, without padding."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(0, preset.vocab, (rows, preset.sequence), generator=generator)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return result
