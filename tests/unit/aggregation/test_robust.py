"""Robust rules against attackers, and weightings, on dense changes as the reference."""

from dataclasses import replace

import pytest
import torch

from flower_split.aggregation import Factors, Update, make_aggregator
from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.rules.coordinate_wise import Median, TrimmedMean
from flower_split.aggregation.rules.krum import Krum, MultiKrum
from flower_split.aggregation.rules.norm_clipping import NormClipping
from flower_split.aggregation.rules.parse import parse_rules
from flower_split.aggregation.rules.rule import ClampWeights, UniformWeights
from flower_split.errors import AggregationError
from tests.support.dense_reference import (
    dense,
    generator,
    initial,
    merged,
    play,
    relative,
    weighted_mean,
)

SEVEN = {"ranks": (4,) * 7, "scales": (2.0,) * 7, "weights": (1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0)}


def federation(attack=0.0, **options):
    """Seven clients; client 3 returns its change times ``attack`` if that is not 0."""
    aggregator = make_aggregator("product-delta")
    state = aggregator.init(initial(trained=True))
    updates = play("product-delta", aggregator, state, **(SEVEN | options))
    if attack:
        sent, back = updates[3].received, updates[3].returned
        worse = Factors(
            sent.A + attack * (back.A - sent.A), sent.B + attack * (back.B - sent.B), back.scale
        )
        updates[3] = replace(updates[3], returned=worse)
    return aggregator, state, updates


def on_module(rule, updates):
    """The rule on the updates of a single module."""
    clients = [ClientUpdate(one.client_id, one.weight, {"": one}) for one in updates]
    return [client.modules[""] for client in rule(clients)]


def change(update):
    return dense(update.returned) - dense(update.received)


def test_norm_clipping_bounds_the_change_of_the_weight_and_spares_the_others():
    _, _, updates = federation(attack=30.0)
    bound = max(float(change(update).norm()) for i, update in enumerate(updates) if i != 3) * 1.01
    assert float(change(updates[3]).norm()) > 10 * bound
    clipped = on_module(NormClipping(max_norm=bound), updates)
    assert float(change(clipped[3]).norm()) == pytest.approx(bound, rel=1e-5)
    assert clipped[3].returned.rank == 4
    for index, (before, after) in enumerate(zip(updates, clipped, strict=True)):
        assert (after is before) == (index != 3)


def test_norm_clipping_does_not_depend_on_the_gauge():
    _, _, updates = federation()
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator(5)))

    def turned(factors):
        return Factors(turn.T @ factors.A, factors.B @ turn, factors.scale)

    bound = float(change(updates[0]).norm()) / 3
    first = on_module(NormClipping(max_norm=bound), updates[:1])
    other = Update("x", turned(updates[0].received), turned(updates[0].returned), 1.0)
    second = on_module(NormClipping(max_norm=bound), [other])
    assert relative(dense(second[0].returned), dense(first[0].returned)) < 1e-5


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(trim=0.2)])
def test_coordinate_wise_rules_stay_near_the_honest_clients(rule):
    aggregator, state, updates = federation(attack=1000.0)
    honest = [update for index, update in enumerate(updates) if index != 3]
    goal = weighted_mean(honest)
    robust = aggregator.aggregate(state, on_module(rule, updates))
    plain = aggregator.aggregate(state, updates)
    assert relative(merged(aggregator, robust), goal) < 1
    assert relative(merged(aggregator, plain), goal) > 100


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    sent = initial(rank=1)
    values = (5.0, -1.0, 2.0, 100.0)
    updates = [
        Update(i, sent, Factors(sent.A, torch.full_like(sent.B, value), 2.0), 1)
        for i, value in enumerate(values)
    ]
    (found,) = on_module(Median(), updates)
    assert torch.equal(found.returned.B, torch.full_like(sent.B, 3.5))
    (found,) = on_module(TrimmedMean(trim=0.25), updates)
    assert torch.equal(found.returned.B, torch.full_like(sent.B, 3.5))
    (found,) = on_module(TrimmedMean(trim=0.0), updates)
    assert torch.equal(found.returned.B, torch.full_like(sent.B, 26.5))


def test_coordinate_wise_rules_refuse_mixed_ranks():
    _, _, updates = federation(ranks=(2, 4, 4, 4, 4, 4, 4))
    with pytest.raises(AggregationError, match="'client-1' and client 'client-0'"):
        on_module(Median(), updates)


@pytest.mark.parametrize("ranks", [(4,) * 7, (2, 4, 3, 4, 2, 4, 3)])
def test_krum_chooses_the_client_with_the_nearest_neighbours(ranks):
    _, _, updates = federation(attack=20.0, ranks=ranks)
    changes = [change(update) for update in updates]
    scores = []
    for i, one in enumerate(changes):
        apart = sorted(float((one - two).square().sum()) for j, two in enumerate(changes) if j != i)
        scores.append(sum(apart[: 7 - 1 - 2]))
    best = min(range(7), key=lambda index: scores[index])
    (found,) = on_module(Krum(malicious=1), updates)
    assert found is updates[best]
    kept = on_module(MultiKrum(malicious=1), updates)
    assert [update.client_id for update in kept] == [
        f"client-{index}" for index in range(7) if index != 3
    ]


def test_krum_with_too_few_clients_is_refused():
    _, _, updates = federation()
    with pytest.raises(AggregationError, match="at least 9 clients in a round; there are 7"):
        on_module(Krum(malicious=3), updates)


def test_clamped_weights_bound_an_absurd_one():
    _, _, updates = federation()
    updates[5] = replace(updates[5], weight=1e9)
    clamped = on_module(ClampWeights(ratio=2.0), updates)
    assert [update.weight for update in clamped] == [1, 2, 3, 1, 2, 4, 1]  # the median is 2
    assert [update.weight for update in on_module(UniformWeights(), updates)] == [1.0] * 7


def test_rules_leave_their_inputs_alone():
    _, _, updates = federation(attack=5.0)
    before = [
        tensor.clone()
        for update in updates
        for factors in (update.received, update.returned)
        for tensor in (factors.A, factors.B)
    ]
    for rule in parse_rules("norm-clipping=0.1, median"):
        on_module(rule, updates)
    after = [
        tensor
        for update in updates
        for factors in (update.received, update.returned)
        for tensor in (factors.A, factors.B)
    ]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_rules_parse_in_their_order():
    assert parse_rules("") == ()
    assert parse_rules("uniform, norm-clipping=1.5,multi-krum=2") == (
        UniformWeights(),
        NormClipping(max_norm=1.5),
        MultiKrum(malicious=2),
    )


@pytest.mark.parametrize(
    "text",
    ["krumm=1", "krum", "krum=x", "krum=1.5", "median=3", "trimmed-mean=0.5", "norm-clipping=0"],
)
def test_invalid_rules_are_refused(text):
    with pytest.raises(AggregationError):
        parse_rules(text)
