"""Tiny models of many families, padded batches, and the comparison with the unsplit model."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 64
NUM_LAYERS = 4

_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}
_NEOX = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": _GPT | _NO_DROPOUT,
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 3},
    "gemma2": _LLAMA | {"sliding_window": 3},
    "gemma3_text": _LLAMA
    | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": _LLAMA,
    "gpt_neox": _NEOX,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
    "bloom": {"hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "alibi": True,
    },
    "gptj": _GPT | _NO_DROPOUT | {"rotary_dim": 4},
    "olmo2": _LLAMA,
    "granite": _LLAMA | {"residual_multiplier": 0.5},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A randomly initialised model of 4 layers, in training mode."""
    torch.manual_seed(seed)
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
    config = CONFIG_MAPPING[family](**(settings | FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).train()


def padded_batch(seed: int = 1) -> dict[str, Tensor]:
    """Three rows of nine tokens: one left-padded, one right-padded, one full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def loss_and_gradients(
    model: PreTrainedModel, batch: dict[str, Tensor], *others: nn.Module
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss of ``model`` and the gradients of its parameters and those of ``others``."""
    for module in (model, *others):
        module.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: parameter.grad
        for module in (model, *others)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return loss.detach(), gradients


def assert_same_bits(expected: dict[str, Tensor | None], actual: dict[str, Tensor | None]) -> None:
    """Same names, and every gradient there and equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        assert value is not None and other is not None, f"{name} has no gradient"
        assert torch.equal(value, other), f"{name} differs"
