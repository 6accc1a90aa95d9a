"""Server optimizers on ΔW against their dense formulas."""

import pytest
import torch

from flower_split.aggregation import METHODS, Factors, Update, make_aggregator
from flower_split.errors import AggregationError
from tests.support.dense_reference import IN, OUT, dense, initial, play, relative

PRODUCT = ["product-delta", "flexlora"]


@pytest.mark.parametrize("name", PRODUCT)
def test_momentum_equals_its_dense_formula(name):
    aggregator = make_aggregator(name, learning_rate=0.7, server_optimizer="momentum")
    state = aggregator.init(initial())
    momentum = torch.zeros(OUT, IN, dtype=torch.float64)
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
        momentum = 0.9 * momentum + change
        state = aggregator.aggregate(state, updates).state
        found = dense(aggregator.delta(state))
        assert relative(found, before + 0.7 * momentum) < 1e-5


@pytest.mark.parametrize(
    ("optimizer", "second"),
    [("adam", 0.9 * 1e-6 + 0.1 * 0.25), ("yogi", 1e-6 + 0.1 * 0.25), ("adagrad", 1e-6 + 0.25)],
)
def test_first_adaptive_step_is_the_one_worked_out_by_hand(optimizer, second):
    # One weight, 1 x 1: Δ = 0.5, β1 = 0.9, β2 = 0.9, τ = 1e-3, so v₀ = 1e-6 and m = 0.05.
    aggregator = make_aggregator(
        "product-delta", learning_rate=0.1, server_optimizer=optimizer, beta2=0.9
    )
    start = Factors(torch.ones(1, 1), torch.zeros(1, 1), 1.0)
    state = aggregator.init(start)
    sent = aggregator.distribute(state, 1, 1.0)
    updates = [Update(0, sent, Factors(sent.A, 0.5 / sent.A, 1.0), 1.0)]
    state = aggregator.aggregate(state, updates).state
    (found,) = dense_of(aggregator.delta(state)).flatten().tolist()
    assert found == pytest.approx(0.1 * 0.05 / (second**0.5 + 1e-3), rel=1e-6)


def dense_of(factors):
    return factors.scale * factors.B.double() @ factors.A.double()


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
    assert set(back.extra) == {"first", "second"}
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
