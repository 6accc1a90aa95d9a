"""Clients that hold only some of the modules, against dense means over those who hold each."""

import pytest
import torch

from flower_split.aggregation import METHODS
from flower_split.aggregation.adapter_aggregator import (
    AdapterAggregator,
    AdapterSpec,
    AdapterUpdate,
)
from flower_split.aggregation.rules.parse import parse_rules
from flower_split.errors import AggregationError
from tests.support.dense_reference import generator, relative

ALL = sorted(METHODS)
LOW, MIDDLE, HIGH = "layers.0.q", "layers.1.q", "layers.2.q"
SCALES = {LOW: 2.0, MIDDLE: 0.5, HIGH: 1.0}
SPECS = {
    0: AdapterSpec(modules=frozenset({LOW})),
    1: AdapterSpec(modules=frozenset({LOW, MIDDLE})),
    2: AdapterSpec(),
}
WEIGHTS = {0: 1.0, 1: 3.0, 2: 4.0}


def adapter():
    rng = generator(3)
    state = {"norm.weight": torch.ones(6)}
    for index, module in enumerate(SCALES):
        state[f"{module}.lora_A.weight"] = torch.randn(3, 6 + index, generator=rng)
        state[f"{module}.lora_B.weight"] = torch.randn(5 + index, 3, generator=rng)
        state[f"{module}.lora_B.bias"] = torch.zeros(5 + index)
        state[f"{module}.lora_magnitude_vector"] = torch.ones(5 + index)
        state[f"{module}.bias"] = torch.zeros(5 + index)
    return state


def started(name="product-delta", **options):
    aggregator = AdapterAggregator(name, SCALES, **options)
    aggregator.init(adapter())
    return aggregator


def update(aggregator, slot, seed=0, spec=None, size=0.3):
    spec = SPECS[slot] if spec is None else spec
    received = aggregator.distribute(spec.ranks, spec.scales, spec.modules)
    rng = generator(100 * seed + slot)
    trainable = set(aggregator.trainable())
    returned = {
        name: value + size * torch.randn(value.shape, generator=rng) * (name in trainable)
        for name, value in received.items()
    }
    return AdapterUpdate(slot, received, returned, WEIGHTS[slot], spec.scales, spec.modules)


def dense(state, module, scale=None):
    a, b = state[f"{module}.lora_A.weight"].double(), state[f"{module}.lora_B.weight"].double()
    return (SCALES[module] if scale is None else scale) * b @ a


def test_distribute_gives_the_modules_asked_for_with_their_biases():
    sent = started().distribute(modules=frozenset({MIDDLE}))
    assert set(sent) == {
        f"{MIDDLE}.lora_A.weight",
        f"{MIDDLE}.lora_B.weight",
        f"{MIDDLE}.lora_B.bias",
        f"{MIDDLE}.lora_magnitude_vector",
        f"{MIDDLE}.bias",
        "norm.weight",
    }


def test_module_is_the_mean_over_the_clients_that_hold_it():
    aggregator = started(max_rank=12)
    updates = [update(aggregator, slot) for slot in (2, 0, 1)]
    summary = aggregator.aggregate(updates)
    assert summary.clients == (0, 1, 2) and summary.unchanged == ()
    holders = {LOW: (0, 1, 2), MIDDLE: (1, 2), HIGH: (2,)}
    sent = aggregator.distribute(12)
    for module, slots in holders.items():
        total = sum(WEIGHTS[slot] for slot in slots)
        by_partition = {one.client_id: one.returned for one in updates}
        mean = sum(WEIGHTS[slot] / total * dense(by_partition[slot], module) for slot in slots)
        assert relative(dense(sent, module), mean) < 1e-6, module
        bias = sum(
            WEIGHTS[s] / total * by_partition[s][f"{module}.lora_B.bias"].double() for s in slots
        )
        assert relative(sent[f"{module}.lora_B.bias"].double(), bias) < 1e-6, module


@pytest.mark.parametrize("name", ALL)
def test_module_that_nobody_holds_stays_bit_for_bit(name):
    aggregator = started(name)
    if name != "fed-sb":  # not at its initial state, where that is not special
        aggregator.aggregate([update(aggregator, 2)])
    before = aggregator.state_dict()
    summary = aggregator.aggregate([update(aggregator, 0, seed=1), update(aggregator, 1, seed=1)])
    after = aggregator.state_dict()
    assert summary.unchanged == (HIGH,)
    of_high = [key for key in before if f"::{HIGH}" in key]
    assert of_high and all(torch.equal(before[key], after[key]) for key in of_high)
    of_low = [key for key in before if f"lora::{LOW}" in key]
    assert not all(torch.equal(before[key], after[key]) for key in of_low if key in after)


def test_module_whose_holders_all_have_weight_zero_stays():
    aggregator = started()
    before = aggregator.deltas()[HIGH]
    one = update(aggregator, 2)
    zero = AdapterUpdate(2, one.received, one.returned, 0.0)
    summary = aggregator.aggregate([update(aggregator, 0), zero])
    assert summary.unchanged == (MIDDLE, HIGH)
    assert torch.equal(aggregator.deltas()[HIGH].B, before.B)


def test_subset_that_is_not_declared_is_refused():
    aggregator = started()
    one = update(aggregator, 0)
    silent = AdapterUpdate(0, one.received, one.returned, 1.0)
    with pytest.raises(AggregationError, match=f"client 0 received .*lacks .*{MIDDLE}"):
        aggregator.aggregate([silent])


@pytest.mark.parametrize("kind", ["lacks", "has unexpected"])
def test_client_must_return_exactly_what_it_was_sent(kind):
    aggregator = started()
    one = update(aggregator, 1)
    returned = dict(one.returned)
    if kind == "lacks":
        del returned[f"{MIDDLE}.lora_B.weight"]
    else:
        returned[f"{HIGH}.lora_B.weight"] = torch.zeros(7, 3)
    bad = AdapterUpdate(1, one.received, returned, 1.0, None, one.modules)
    with pytest.raises(AggregationError, match=f"client 1 returned .*{kind}"):
        aggregator.aggregate([bad])


def test_module_that_the_initial_adapter_does_not_have_is_refused_by_name():
    aggregator = started()
    with pytest.raises(AggregationError, match=r"layers\.9\.q, which the initial adapter"):
        aggregator.distribute(modules=frozenset({"layers.9.q"}))


def test_median_of_a_module_is_over_its_holders():
    aggregator = started("fedit", transforms=parse_rules("median"))
    updates = [update(aggregator, slot) for slot in (0, 1, 2)]
    aggregator.aggregate(updates)
    sent = aggregator.distribute()
    name = f"{LOW}.lora_B.weight"
    stacked = torch.stack([one.returned[name] for one in updates])
    torch.testing.assert_close(sent[name], stacked.sort(dim=0).values[1])
    torch.testing.assert_close(
        sent[f"{HIGH}.lora_A.weight"], updates[2].returned[f"{HIGH}.lora_A.weight"]
    )


def test_krum_refuses_clients_of_different_modules():
    aggregator = started(transforms=parse_rules("krum=0"))
    with pytest.raises(AggregationError, match="client 1 and client 0 hold different modules"):
        aggregator.aggregate([update(aggregator, slot) for slot in (0, 1, 2)])


def test_run_with_subsets_continues_from_a_checkpoint_bit_for_bit():
    options = {"server_optimizer": "adam", "learning_rate": 0.1}
    one, two = started(**options), AdapterAggregator("product-delta", SCALES, **options)
    one.aggregate([update(one, 0), update(one, 1)])
    two.load_state_dict(one.state_dict(), adapter())
    for aggregator in (one, two):
        aggregator.aggregate([update(aggregator, slot, seed=4) for slot in (1, 2)])
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
