"""Tiny models whose sampled text varies, prompts, and the three ways to generate."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from flower_split.split import CutLayers
from flower_split.split.structure.host_call import cache_argument
from tests.support.sampling import sampled
from tests.support.tiny_models import tiny_model

CUTS = CutLayers(1, 3)
NEW_TOKENS = 64
FAMILIES = sampled(
    ("gpt2", "llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox"),
    *("gpt2", "llama", "gemma3_text"),  # learned positions, rotary, sliding windows
)
_LONG = {
    "gpt2": {"n_positions": 128},
    "mistral": {"max_position_embeddings": 128, "sliding_window": 8},
    "gemma2": {"max_position_embeddings": 128, "sliding_window": 8},
    "gemma3_text": {"max_position_embeddings": 128, "sliding_window": 8},
}
MODES: dict[str, dict[str, object]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beam": {"num_beams": 3, "do_sample": False},
}


def going_on(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The argument with which a model goes on from a cache, as its transformers calls it."""
    return {cache_argument(type(model).forward): cache}


def lively_model(family: str) -> PreTrainedModel:
    """Weights large enough that every position matters for the next token."""
    changes = _LONG.get(family, {"max_position_embeddings": 128})
    model = tiny_model(family, **changes).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                size = 0.25 if "embed" not in name and "wte" not in name else 1.0
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def prompts() -> dict[str, Tensor]:
    """Two prompts of unequal length, left-padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model: PreTrainedModel, mode: str, **options: object) -> Tensor:
    """64 new tokens per prompt, whatever is generated; ``[batch, prompt + 64]``."""
    torch.manual_seed(11)
    tokens = model.generate(
        **prompts(),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        **MODES[mode],
        **options,
    )
    assert tokens.shape == (2, 7 + NEW_TOKENS)
    return tokens
