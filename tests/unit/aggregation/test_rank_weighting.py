"""product-delta with a component's change averaged over its holders, against a dense reference."""

import pytest
import torch

from flower_split.aggregation import make_aggregator
from flower_split.aggregation.from_config import check_strategy
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from tests.support.dense_reference import dense, initial, play, relative

MIXED = {"ranks": (2, 4, 6), "scales": (4.0, 2.0, 0.5)}


def played(rounds=3, options=MIXED, **settings):
    """Yields the aggregator, the state before each round, and its updates."""
    aggregator = make_aggregator("product-delta", rank_weighting="holders", **settings)
    state = aggregator.init(initial(trained=True))
    for server_round in range(rounds):
        updates = play("product-delta", aggregator, state, server_round=server_round, **options)
        yield aggregator, state, updates
        state = aggregator.aggregate(state, updates).state


def component(factors, p):
    return factors.scale * torch.outer(factors.B[:, p].double(), factors.A[p].double())


def test_change_of_each_component_is_the_mean_over_its_holders():
    for aggregator, state, updates in played():
        expected = dense(aggregator.delta(state))
        for p in range(6):
            held = [update for update in updates if update.returned.rank > p]
            total = sum(update.weight for update in held)
            for update in held:
                change = component(update.returned, p) - component(update.received, p)
                expected = expected + update.weight / total * change
        found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
        assert relative(found, expected) < 1e-6
        exact = make_aggregator("product-delta").aggregate(state, updates).state
        assert relative(found, dense(exact.factors)) > 1e-2


def test_without_truncation_it_is_raflora():
    for aggregator, state, updates in played(rounds=2):
        other = make_aggregator("raflora", max_rank=18)
        found = aggregator.delta(aggregator.aggregate(state, updates).state)
        expected = other.delta(other.aggregate(state, updates).state)
        assert relative(dense(found), dense(expected)) < 1e-6


def test_equal_ranks_give_the_exact_mean():
    for aggregator, state, updates in played(options={}):
        exact = make_aggregator("product-delta").aggregate(state, updates).state
        found = aggregator.aggregate(state, updates).state
        assert relative(dense(found.factors), dense(exact.factors)) < 1e-6


def test_round_without_training_under_mixed_ranks_changes_no_bit():
    for aggregator, state, _ in played(rounds=2):
        idle = play("product-delta", aggregator, state, size=0, **MIXED)
        after = aggregator.aggregate(state, idle).state
        assert torch.equal(after.factors.A, state.factors.A)
        assert torch.equal(after.factors.B, state.factors.B)


def test_server_learning_rate_and_momentum_apply_to_it():
    settings = {"learning_rate": 0.5, "server_optimizer": "momentum"}
    (aggregator, state, updates), *_ = played(rounds=1, **settings)
    before = dense(aggregator.delta(state))
    plain = make_aggregator("product-delta", rank_weighting="holders")
    step = dense(plain.aggregate(state, updates).state.factors) - before
    found = dense(aggregator.aggregate(state, updates).state.factors)
    assert relative(found, before + 0.5 * step) < 1e-6


def test_option_is_read_and_checked():
    method = check_strategy(StrategyConfig(options="rank-weighting=holders"))
    assert method == make_aggregator("product-delta", rank_weighting="holders")
    with pytest.raises(AggregationError, match="rank_weighting must be all or holders"):
        check_strategy(StrategyConfig(options="rank-weighting=some"))
