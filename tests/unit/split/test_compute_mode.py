"""Mode ``fast``: which forwards are compiled, under which autocast, and that training caches nothing."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.split import CutLayers, split_model
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.split.structure.kv_cache import find_cache

CUTS = CutLayers(1, 3)


def make(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The layers whose forward was compiled, and so traced at its first call."""
    found: list[object] = []

    def note(forward: Callable[..., object]) -> Callable[..., object]:
        found.append(forward.__self__)  # type: ignore[attr-defined]
        return forward

    monkeypatch.setattr(torch, "compile", note)
    return found


def test_fast_compiles_the_owned_layers_and_no_stand_in(compiled: list[object]) -> None:
    client, trunk = split_model(make(torch.float32), CUTS)
    compute_fast(trunk, trunk.stack.layers(trunk))
    assert compiled == [trunk.stack.layers(trunk)[1], trunk.stack.layers(trunk)[2]]
    compiled.clear()
    compute_fast(client, client.model.layers)
    assert compiled == [client.model.layers[0], client.model.layers[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_computes_under_autocast_where_the_base_has_16_bits(
    dtype: torch.dtype, compiled: list[object]
) -> None:
    _, trunk = split_model(make(dtype), CUTS)
    compute_fast(trunk, trunk.stack.layers(trunk))
    seen: list[bool] = []
    first = trunk.stack.layers(trunk)[1]
    first.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trunk(torch.zeros(1, 2, 32, dtype=dtype), attention_mask=torch.ones(1, 2))
    assert seen == [dtype is torch.bfloat16]


def test_fast_in_training_keeps_no_keys_and_values(compiled: list[object]) -> None:
    _, trunk = split_model(make(torch.float32), CUTS)
    compute_fast(trunk, trunk.stack.layers(trunk))
    seen: list[bool] = []
    trunk.stack.layers(trunk)[1].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(find_cache(args, kwargs) is None),
        with_kwargs=True,
    )
    for training in (True, False):
        trunk.train(training)
        trunk(torch.zeros(1, 2, 32), attention_mask=torch.ones(1, 2), use_cache=True)
    assert seen == [True, False]


def test_fast_in_fp32_without_a_compiler_has_the_bits_of_exact(compiled: list[object]) -> None:
    torch.manual_seed(1)
    hidden, mask = torch.randn(2, 5, 32), torch.ones(2, 5)
    _, exact = split_model(make(torch.float32), CUTS)
    _, fast = split_model(make(torch.float32), CUTS)
    compute_fast(fast, fast.stack.layers(fast))
    assert torch.equal(exact(hidden, attention_mask=mask), fast(hidden, attention_mask=mask))
