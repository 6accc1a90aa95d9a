"""Server optimizers on ΔW against their dense formulas."""

import pytest
import torch

from flower_split.aggregation import METHODS, make_aggregator
from flower_split.errors import AggregationError
from tests.support.dense_reference import dense, initial, play, relative

PRODUCT = ["product-delta", "flexlora"]


def dense_step(name, change, moments, beta1=0.9, beta2=0.99, epsilon=1e-3):
    """One step of the dense formula with a second moment of row and column means."""
    if name == "momentum":
        moments["m"] = beta1 * moments.get("m", 0) + change
        return moments["m"]
    moments["m"] = beta1 * moments.get("m", 0) + (1 - beta1) * change
    square = change.square() + epsilon**2
    for key, now in (("rows", square.mean(dim=1)), ("columns", square.mean(dim=0))):
        old = moments.get(key, torch.full_like(now, epsilon**2))
        if name == "adagrad":
            moments[key] = old + now
        elif name == "adam":
            moments[key] = beta2 * old + (1 - beta2) * now
        else:
            moments[key] = old - (1 - beta2) * now * torch.sign(old - now)
    second = torch.outer(moments["rows"], moments["columns"]) / moments["rows"].mean()
    return moments["m"] / second.sqrt()


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize("name", PRODUCT)
def test_server_optimizer_equals_its_dense_formula(name, optimizer):
    rate = 0.7 if optimizer == "momentum" else 0.01
    aggregator = make_aggregator(name, learning_rate=rate, server_optimizer=optimizer)
    state = aggregator.init(initial())
    moments = {}
    for server_round in range(4):
        updates = play(name, aggregator, state, server_round=server_round, ranks=(3, 4, 6))
        before = dense(aggregator.delta(state))
        change = sum(
            (update.weight / 8)
            * (
                dense(update.returned)
                - (dense(update.received) if name == "product-delta" else before)
            )
            for update in updates
        )
        expected = before + rate * dense_step(optimizer, change, moments)
        state = aggregator.aggregate(state, updates).state
        assert relative(dense(aggregator.delta(state)), expected) < 1e-5


def test_momentum_goes_on_in_a_round_without_training():
    aggregator = make_aggregator("product-delta", server_optimizer="momentum", beta1=0.5)
    state = aggregator.init(initial())
    first = aggregator.aggregate(state, play("product-delta", aggregator, state)).state
    idle = play("product-delta", aggregator, first, server_round=1, size=0)
    second = aggregator.aggregate(first, idle).state
    expected = 1.5 * dense(aggregator.delta(first))
    assert relative(dense(aggregator.delta(second)), expected) < 1e-6


def test_moments_survive_a_checkpoint():
    aggregator = make_aggregator("product-delta", server_optimizer="yogi", max_rank=8)
    state = aggregator.init(initial())
    state = aggregator.aggregate(state, play("product-delta", aggregator, state)).state
    back = aggregator.load_state_dict(aggregator.state_dict(state))
    assert set(back.extra) == {"momentum.A", "momentum.B", "second.rows", "second.columns"}
    updates = play("product-delta", aggregator, state, server_round=1)
    one, two = (aggregator.aggregate(start, updates).state.factors for start in (state, back))
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi", "adagrad"])
def test_round_without_any_change_stays_finite(optimizer):
    aggregator = make_aggregator("product-delta", server_optimizer=optimizer)
    state = aggregator.init(initial())
    for server_round in range(3):
        updates = play("product-delta", aggregator, state, server_round=server_round, size=0)
        state = aggregator.aggregate(state, updates).state
    assert not dense(aggregator.delta(state)).any()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"product-delta", "flexlora", "florist"}))
def test_server_optimizer_is_refused_where_the_server_keeps_no_product(name):
    with pytest.raises(AggregationError, match=f"{name} takes no server optimizer.*basis"):
        make_aggregator(name, server_optimizer="adam")


@pytest.mark.parametrize(
    "options",
    [{"server_optimizer": "sgd"}, {"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(AggregationError, match=next(iter(options))):
        make_aggregator("product-delta", **options)
