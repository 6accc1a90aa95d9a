"""Clients with different cut layers on one trunk."""

import pytest
import torch

from flower_split.config import LoraPartConfig
from flower_split.errors import SplitError
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, set_trunk, split_model
from tests.support.tiny_models import assert_same_bits, loss_and_gradients, padded_batch, tiny_model

WIDE, NARROW = CutLayers(1, 5), CutLayers(2, 4)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_span_clients_of_both_cuts_match_unsplit_bitwise(family: str) -> None:
    layers = {"n_layer": 6} if family == "bloom" else {"num_hidden_layers": 6}
    model = tiny_model(family, **layers)
    expected, gradients = loss_and_gradients(model, padded_batch())
    wide_client, trunk = split_model(model, WIDE)
    narrow_client, _ = split_model(model, NARROW)
    set_trunk(narrow_client, trunk.span(NARROW))
    for client, cuts in ((wide_client, WIDE), (narrow_client, NARROW), (wide_client, WIDE)):
        trunk.zero_grad(set_to_none=True)
        loss, split = loss_and_gradients(client, padded_batch(), trunk.span(cuts))
        assert torch.equal(loss, expected)
        assert_same_bits(gradients, split)
        # The trunk's copy of a layer that the client holds itself has no part in its loss.
        for name, parameter in trunk.named_parameters():
            index = trunk.stack.index_of(name)
            assert (parameter.grad is None) == (cuts.part_of(index) != "trunk"), name


def test_span_shares_the_weights_and_the_mode() -> None:
    _, trunk = split_model(tiny_model("llama", num_hidden_layers=6), WIDE)
    span = trunk.span(NARROW)
    own = dict(trunk.named_parameters())
    assert {n.split(".")[2] for n, _ in span.named_parameters()} == {"2", "3"}
    assert all(parameter is own[name] for name, parameter in span.named_parameters())
    assert trunk.span(NARROW) is span and trunk.span(WIDE) is trunk
    trunk.eval()
    assert not any(module.training for module in span.modules())


def test_span_made_before_adapters_has_them_too() -> None:
    _, trunk = split_model(tiny_model("llama", num_hidden_layers=6), WIDE)
    span = trunk.span(NARROW)
    attach_lora(trunk, WIDE, {"trunk": LoraPartConfig(r=2)}, seed=0)
    adapted = {n for n, p in span.named_parameters() if p.requires_grad}
    assert adapted and all("lora_" in name for name in adapted)


@pytest.mark.parametrize("cuts", [CutLayers(0, 3), CutLayers(2, 6)], ids=str)
def test_span_beyond_the_trunk_is_refused(cuts: CutLayers) -> None:
    _, trunk = split_model(tiny_model("llama", num_hidden_layers=6), WIDE)
    with pytest.raises(SplitError, match="holds layers 1 to 4"):
        trunk.span(cuts)
