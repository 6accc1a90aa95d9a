"""Clients with different cut layers on one served trunk, each against the unsplit model, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.split import CutLayers, TrunkModel, set_trunk, split_model
from flower_split.trunk.compute.activations import Activation
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.compute.kv_caches import bytes_per_position
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.generation_rig import MODES, generated, lively_model
from tests.support.loopback import FINGERPRINT, coordinator, plan, remote, served
from tests.support.sampling import sampled
from tests.support.tiny_models import FAMILIES, loss_and_gradients, padded_batch, tiny_model

WIDE = CutLayers(1, 4)
CUTS = (WIDE, CutLayers(2, 3), CutLayers(1, 3))


class RecordingCompute(TrunkCompute):
    """Keeps the gradients of the last backward by name."""

    gradients: dict[str, Tensor | None]

    def backward(
        self, activation: Activation, trunk_output_grad: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        smashed_grad, gradients = super().backward(activation, trunk_output_grad)
        names = [name for name, _ in self.named]
        self.gradients = dict(zip(names, gradients, strict=True))
        return smashed_grad, gradients


@contextmanager
def serving(trunk: TrunkModel, **options: object) -> Iterator[tuple[int, TrunkEngine]]:
    compute = RecordingCompute(
        trunk, OptimizerConfig(name="sgd", learning_rate=0.1, max_grad_norm=0.0), seed=0
    )
    engine = TrunkEngine(
        compute,
        mode="joint",
        hidden_size=trunk.hidden_size,
        fingerprint=FINGERPRINT,
        activation_bytes=1 << 26,
        **options,
    )
    with served(engine) as port:
        yield port, engine


@pytest.mark.parametrize("family", FAMILIES)
def test_clients_of_three_cuts_over_grpc_match_the_unsplit_model_bitwise(family: str) -> None:
    model = tiny_model(family)
    expected_loss, expected = loss_and_gradients(model, padded_batch())
    clients = [split_model(model, cuts)[0] for cuts in CUTS]
    with serving(split_model(model, WIDE)[1]) as (port, engine), coordinator(port) as control:
        control.begin_round(plan(len(CUTS)))
        wires = [remote(port, slot=slot, cuts=cuts) for slot, cuts in enumerate(CUTS)]
        for wire in wires:
            wire.open(1)
        found = {}
        for slot, (client, wire) in enumerate(zip(clients, wires, strict=True)):
            client.zero_grad(set_to_none=True)
            set_trunk(client, wire)
            with wire.micro_batch(0, 0, num_tokens=20, loss_denominator=20.0, last=True):
                loss = client(**padded_batch()).loss
            loss.backward()
            assert torch.equal(loss, expected_loss)
            passed = {n: g for n, g in engine.compute.gradients.items() if g is not None}
            own = {n: p.grad.clone() for n, p in client.named_parameters() if p.grad is not None}
            found[slot] = (own, passed)
        for wire in wires:
            wire.close()
    for slot, (own, passed) in found.items():
        for name, gradient in expected.items():
            assert gradient is not None
            assert torch.equal(own.get(name, passed.get(name)), gradient), (CUTS[slot], name)
        assert not own.keys() & passed.keys()


def test_client_without_cuts_runs_the_whole_trunk_only_where_the_fingerprint_says_so() -> None:
    model = tiny_model("llama")
    theirs = {**FINGERPRINT, "cut-layers": "2:3"}
    with serving(split_model(model, WIDE)[1]) as (port, engine), coordinator(port) as control:
        engine.fingerprint = {**FINGERPRINT, "cut-layers": "1:4"}
        control.begin_round(plan())
        with remote(port, fingerprint=theirs) as wire:
            with pytest.raises(TrunkRefused, match=r"cut-layers \(trunk: 1:4, client: 2:3\)"):
                wire.open(1)
        with remote(port, fingerprint=theirs, cuts=CutLayers(2, 3)) as wire:
            assert wire.open(1).slot == 0


def test_cuts_beyond_the_trunk_are_refused_over_grpc_with_the_reason() -> None:
    with serving(split_model(tiny_model("llama"), WIDE)[1]) as (port, _):
        with coordinator(port) as control:
            control.begin_round(plan())
            with remote(port, cuts=CutLayers(0, 3)) as wire, pytest.raises(TrunkRefused) as caught:
                wire.open(1)
    assert caught.value.reason is RefusalReason.FINGERPRINT_MISMATCH
    assert "holds layers 1 to 3" in str(caught.value) and "second cut 3" in str(caught.value)


@pytest.mark.parametrize("mode", sampled(MODES, "sampling"))
def test_generation_with_own_cuts_gives_the_unsplit_models_tokens(mode: str) -> None:
    model = lively_model("gemma2")
    expected = generated(model, mode)
    narrow = CutLayers(2, 3)
    client, _ = split_model(model, narrow)
    trunk = split_model(model, WIDE)[1]
    with serving(trunk) as (port, engine), coordinator(port) as control:
        control.begin_round(plan(2, evaluate=True))
        with remote(port, slot=1, cuts=narrow) as wire:
            wire.open(0, evaluate=True)
            set_trunk(client, wire)
            assert torch.equal(generated(client, mode), expected)
            # One layer's keys and values are kept, not three.
            held = engine.cache_bytes()
            wide, _ = split_model(model, WIDE)
            with remote(port, slot=0) as other:
                other.open(0, evaluate=True)
                set_trunk(wide, other)
                assert torch.equal(generated(wide, mode), expected)
                assert engine.cache_bytes() - held > 2 * held > 0


def test_key_value_cache_of_one_layer_needs_the_room_of_one() -> None:
    model, narrow = lively_model("llama"), CutLayers(2, 3)
    client, _ = split_model(model, narrow)
    compute = TrunkCompute(split_model(model, WIDE)[1], OptimizerConfig(), seed=0)
    compute.spans.admit(narrow)
    whole, one = bytes_per_position(compute), bytes_per_position(compute, narrow)
    assert whole > 2 * one
    # Room for the cache of one layer, not of three.
    budget = 80 * 2 * one + 2 * 7 * model.config.hidden_size * 4
    assert 71 * 2 * whole > budget
    with serving(split_model(model, WIDE)[1], cache_bytes=budget) as (port, _):
        with coordinator(port) as control:
            control.begin_round(plan(2, evaluate=True))
            with remote(port, slot=1, cuts=narrow) as wire:
                wire.open(0, evaluate=True)
                set_trunk(client, wire)
                assert torch.equal(generated(client, "greedy"), generated(model, "greedy"))


def test_expert_that_a_client_passes_by_counts_as_zero_not_as_absent() -> None:
    """A parameter inside the span without a gradient keeps its share of the denominator."""
    compute = TrunkCompute(split_model(tiny_model("mixtral"), WIDE)[1], OptimizerConfig(), seed=0)
    cuts = CutLayers(2, 3)
    compute.spans.admit(cuts)
    covers = compute.covers(cuts)
    assert covers is not None and any(covers) and not all(covers)
    gradient = SlotGradient(covers)
    inside = [name for (name, _), covered in zip(compute.named, covers, strict=True) if covered]
    assert any("experts" in name for name in inside)
    assert all(".2." in name for name in inside)
    gradient.add(0, [None] * len(covers), num_tokens=1.0, loss_denominator=1.0)
    assert all(gradient.passes(index) == covered for index, covered in enumerate(covers))
