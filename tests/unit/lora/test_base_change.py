"""A base change beside the layer, against the dense model whose weights hold it, worked out in fp64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flower_split.aggregation import Factors
from flower_split.config import LoraPartConfig
from flower_split.errors import SplitError
from flower_split.lora import adapter_state, attach_lora, load_adapter_state, lora_scales
from flower_split.lora.base_change import base_change_factors, base_change_state, set_base_change
from flower_split.split import CutLayers, split_model
from tests.support.tiny_models import loss_and_gradients, padded_batch, tiny_model

CUTS = CutLayers(1, 3)
EMBEDDING = {"llama": "embed_tokens", "gemma3_text": "embed_tokens", "gpt2": "wte"}
UP = {"llama": "up_proj", "gemma3_text": "up_proj", "gpt2": "c_fc"}
UP_PROJ = "model.layers.0.mlp.up_proj"
DOWN = {"llama": "down_proj", "gemma3_text": "down_proj", "gpt2": "c_proj"}


def parts(family: str) -> dict[str, LoraPartConfig]:
    bottom = f"{UP[family]},{EMBEDDING[family]}"
    return {
        "bottom": LoraPartConfig(r=2, target_modules=bottom),
        "top": LoraPartConfig(r=3, target_modules=f"{DOWN[family]},lm_head"),
    }


def untied(family: str) -> PreTrainedModel:
    """Untied, so that the embedding's weight can be changed without the head's."""
    return tiny_model(family, tie_word_embeddings=False)


def random_change(model: nn.Module, seed: int, rank: int = 5) -> dict[str, Factors]:
    """A change of every LoRA module that is as large as its weight."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in lora_scales(model):
        base = model.get_submodule(name).get_base_layer()
        out, into = base.weight.shape[::-1] if isinstance(base, Conv1D) else base.weight.shape
        size = float(base.weight.std()) / rank**0.5
        a = torch.randn(rank, into, generator=generator)
        changes[name] = Factors(a, torch.randn(out, rank, generator=generator) * size)
    return changes


def changed_densely(family: str, changes: dict[str, Factors]) -> PreTrainedModel:
    """The unsplit model with the change in its weights."""
    model = untied(family)
    for name, change in changes.items():
        module = model.get_submodule(name)
        delta = change.scale * change.B.double() @ change.A.double()
        delta = delta.T if isinstance(module, Conv1D) else delta
        module.weight.data = (module.weight.data.double() + delta).float()
    return model


def filled(model: nn.Module) -> None:
    """Give every LoRA weight a value."""
    generator = torch.Generator().manual_seed(7)
    state = adapter_state(model)
    load_adapter_state(
        model, {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in state.items()}
    )


def client(family: str) -> PreTrainedModel:
    model, _ = split_model(untied(family), CUTS)
    attach_lora(model, CUTS, parts(family), seed=0)
    filled(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_base_change_computes_what_changed_weights_compute(family: str) -> None:
    model = client(family)
    plain = model(**padded_batch()).logits
    changes = random_change(model, 1)
    set_base_change(model, base_change_state(changes))
    dense = changed_densely(family, changes)
    attach_lora(dense, CUTS, parts(family), seed=0)
    filled(dense)
    loss, gradients = loss_and_gradients(model, padded_batch())
    expected_loss, expected = loss_and_gradients(dense, padded_batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    logits = model(**padded_batch()).logits
    torch.testing.assert_close(logits, dense(**padded_batch()).logits, rtol=1e-4, atol=1e-4)
    assert (logits - plain).abs().max() > 0.1
    # The bottom's gradients have come through the top's changed layers.
    assert gradients.keys() == expected.keys() and len(gradients) > 4
    for name, gradient in expected.items():
        own = gradients[name]
        assert own is not None and gradient is not None
        assert (own - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_base_change_of_other_columns_would_not_compute_that() -> None:
    model = client("llama")
    change = random_change(model, 1)[UP_PROJ]
    set_base_change(model, base_change_state({UP_PROJ: Factors(change.A.flip(1), change.B)}))
    dense = changed_densely("llama", {UP_PROJ: change})
    attach_lora(dense, CUTS, parts("llama"), seed=0)
    filled(dense)
    expected = dense(**padded_batch()).logits
    assert (model(**padded_batch()).logits - expected).abs().max() > 0.01


def test_base_change_is_no_parameter_and_no_part_of_the_adapter() -> None:
    model = client("llama")
    before, scales = adapter_state(model), lora_scales(model)
    parameters = [name for name, _ in model.named_parameters()]
    state = list(model.state_dict())
    set_base_change(model, base_change_state(random_change(model, 1)))
    assert [name for name, _ in model.named_parameters()] == parameters
    assert list(model.state_dict()) == state
    assert list(adapter_state(model)) == list(before) and lora_scales(model) == scales


def test_base_change_of_nothing_leaves_no_hook_and_the_same_bits() -> None:
    model = client("llama")
    plain = model(**padded_batch()).logits
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    set_base_change(model, base_change_state(random_change(model, 1)))
    assert not torch.equal(model(**padded_batch()).logits, plain)
    set_base_change(model, {})
    assert torch.equal(model(**padded_batch()).logits, plain)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_base_change_replaces_the_one_before_also_in_a_copy() -> None:
    model = client("llama")
    first, second = (base_change_state(random_change(model, seed)) for seed in (1, 2))
    set_base_change(model, second)
    expected = model(**padded_batch()).logits
    set_base_change(model, first)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        set_base_change(one, second)
        assert torch.equal(one(**padded_batch()).logits, expected)


def test_base_change_survives_a_bfloat16_base_that_swallows_what_is_merged() -> None:
    model = untied("llama").to(torch.bfloat16)
    attach_lora(model, CUTS, {"bottom": LoraPartConfig(r=1, target_modules="up_proj")}, seed=0)
    base = model.get_submodule(UP_PROJ).get_base_layer()
    weight = base.weight.detach().double()
    torch.manual_seed(2)  # a tenth of a percent of the weight: below the rounding of bf16
    change = Factors(torch.randn(1, 32), torch.randn(48, 1) * float(weight.std()) * 1e-3)
    dense = change.B.double() @ change.A.double()
    merged = (weight + dense).bfloat16().double() - weight
    assert (merged - dense).norm() > 0.3 * dense.norm()
    set_base_change(model, base_change_state({UP_PROJ: change}))
    base.weight.data.zero_()
    beside = base(torch.eye(32, dtype=torch.bfloat16)).double().T
    assert (beside - dense).norm() < 5e-3 * dense.norm()  # rounded to bf16 once


def test_base_change_state_folds_the_scale_and_leaves_out_what_did_not_change() -> None:
    changes = {
        "b": Factors(torch.ones(1, 2), torch.ones(3, 1), 4.0),
        "a": Factors(torch.zeros(0, 2), torch.zeros(3, 0)),
    }
    state = base_change_state(changes)
    assert sorted(state) == ["b.base_A", "b.base_B"]
    found = base_change_factors(state)["b"]
    assert torch.equal(found.scale * found.B @ found.A, torch.full((3, 2), 4.0))


def _bad(name: str, **tensors: Tensor) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (_bad(UP_PROJ, base_A=torch.ones(1, 32)), "one of its two factors"),
        (_bad(UP_PROJ, base_A=torch.ones(1, 32), base_B=torch.ones(48, 2)), "of shapes"),
        (_bad(UP_PROJ, base_A=torch.ones(1, 48), base_B=torch.ones(32, 1)), "its weight is"),
        (_bad("model.nowhere", base_A=torch.ones(1, 2), base_B=torch.ones(2, 1)), "no module"),
        (_bad(UP_PROJ, lora_A=torch.ones(1, 32)), "no tensor of a base change"),
    ],
)
def test_base_change_that_does_not_fit_is_refused_and_changes_nothing(
    state: dict[str, Tensor], problem: str
) -> None:
    model = client("llama")
    set_base_change(model, base_change_state(random_change(model, 1)))
    before = model(**padded_batch()).logits
    with pytest.raises(SplitError, match=problem):
        set_base_change(model, state)
    assert torch.equal(model(**padded_batch()).logits, before)
