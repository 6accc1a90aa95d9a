"""The split model against the unsplit one, bit for bit in fp32 on CPU."""

import copy

import pytest
import torch
from torch import nn

from flower_split.config import LoraPartConfig
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.split import CutLayers, set_trunk, split_model
from tests.support.tiny_models import (
    FAMILIES,
    assert_same_bits,
    loss_and_gradients,
    padded_batch,
    tiny_model,
)

CUTS = CutLayers(1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_padded_batch_matches_unsplit_bitwise(family: str) -> None:
    model = tiny_model(family)
    client, trunk = split_model(model, CUTS)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_model_with_lora_matches_unsplit_bitwise(family: str) -> None:
    model = tiny_model(family)
    parts = {
        "bottom": LoraPartConfig(r=2),
        "trunk": LoraPartConfig(r=3, alpha=6.0),
        "top": LoraPartConfig(r=4, use_rslora=True),
    }
    client, trunk = split_model(model, CUTS)
    attach_lora(model, CUTS, parts, seed=5)
    attach_lora(client, CUTS, {"bottom": parts["bottom"], "top": parts["top"]}, seed=5)
    attach_lora(trunk, CUTS, {"trunk": parts["trunk"]}, seed=5)
    # B begins at zero, which would leave every A without a gradient: use values of our own.
    generator = torch.Generator().manual_seed(7)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.1
        for name, value in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    load_adapter_state(client, {k: state[k] for k in adapter_state(client)})
    load_adapter_state(trunk, {k: state[k] for k in adapter_state(trunk)})
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)
    assert all(torch.count_nonzero(g) > 0 for g in gradients.values() if g is not None)


@pytest.mark.parametrize("cuts", [CutLayers(0, 1), CutLayers(0, 4), CutLayers(3, 4)])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_split_model_cuts_at_the_ends_match_unsplit(family: str, cuts: CutLayers) -> None:
    model = tiny_model(family)
    client, trunk = split_model(model, cuts)
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)


def test_split_model_packed_positions_match_unsplit() -> None:
    model = tiny_model("llama")
    client, trunk = split_model(model, CUTS)
    batch = {k: v for k, v in padded_batch().items() if k != "attention_mask"}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1)
    loss, gradients = loss_and_gradients(model, batch)
    split_loss, split_gradients = loss_and_gradients(client, batch, trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)
    unpacked = {k: v for k, v in batch.items() if k != "position_ids"}
    assert not torch.equal(loss, model(**unpacked).loss)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon", "bloom"])
def test_split_model_with_dropout_and_equal_seeds_matches_unsplit(family: str) -> None:
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout")
    changes = dict.fromkeys((*names, "attention_dropout"), 0.2)
    model = tiny_model(family, **changes)
    client, trunk = split_model(model, CUTS)
    torch.manual_seed(8)
    loss, gradients = loss_and_gradients(model, padded_batch())
    torch.manual_seed(8)
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    assert_same_bits(gradients, split_gradients)
    torch.manual_seed(9)
    assert not torch.equal(loss, loss_and_gradients(model, padded_batch())[0])


def test_tiny_mistral_window_is_active() -> None:
    windowed, full = tiny_model("mistral"), tiny_model("mistral", sliding_window=None)
    batch = padded_batch()
    assert not torch.equal(windowed(**batch).logits, full(**batch).logits)


class _AnotherProcess(nn.Module):
    """A trunk that sees copies of the three tensors and nothing else, as across a network."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        self.inputs: list[torch.Tensor] = []

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        copies = [t.clone() if t is not None else None for t in (attention_mask, position_ids)]
        self.inputs.append(hidden_states)
        return self.trunk(hidden_states, copies[0], copies[1])


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt", "bloom", "mixtral"])
def test_trunk_called_apart_with_autograd_grad_matches_unsplit(family: str) -> None:
    model = tiny_model(family)
    batch = padded_batch()
    _, gradients = loss_and_gradients(model, batch)
    client, trunk = split_model(model, CUTS)
    apart = copy.deepcopy(trunk)
    seen: dict[str, torch.Tensor] = {}

    class ByHand(nn.Module):
        """Detaches at both cut layers, as a network does, and keeps what crossed."""

        def forward(
            self,
            hidden_states: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            seen["smashed"] = hidden_states
            seen["input"] = hidden_states.detach().requires_grad_()
            seen["output"] = apart(seen["input"], attention_mask, position_ids)
            seen["returned"] = seen["output"].detach().requires_grad_()
            return seen["returned"]

    set_trunk(client, ByHand())
    client(**batch).loss.backward()
    parameters = dict(apart.named_parameters())
    smashed_grad, *parameter_grads = torch.autograd.grad(
        seen["output"], [seen["input"], *parameters.values()], seen["returned"].grad
    )
    seen["smashed"].backward(smashed_grad)
    actual = {name: p.grad for name, p in client.named_parameters()}
    actual.update(zip(parameters, parameter_grads, strict=True))
    assert_same_bits(gradients, actual)


def test_trunk_replaced_by_set_trunk_is_the_one_called() -> None:
    model = tiny_model("llama")
    client, trunk = split_model(model, CUTS)
    replacement = _AnotherProcess(trunk)
    before = client(**padded_batch()).logits
    set_trunk(client, replacement)
    assert torch.equal(client(**padded_batch()).logits, before)
    assert len(replacement.inputs) == 1
    for parameter in replacement.parameters():
        parameter.data.mul_(1.5)
    assert not torch.equal(client(**padded_batch()).logits, before)
