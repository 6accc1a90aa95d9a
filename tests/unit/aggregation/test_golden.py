"""The golden properties of LoRA aggregation, per method, with the methods that must break them."""

from dataclasses import replace

import pytest
import torch

from flower_split.aggregation import METHODS, Factors, Update, make_aggregator
from flower_split.errors import AggregationError
from tests.support.dense_reference import (
    IN,
    OUT,
    best_of_rank,
    dense,
    generator,
    initial,
    merged,
    play,
    relative,
    trained,
    weighted_mean,
)

ALL = sorted(METHODS)
MIXED = [name for name in ALL if METHODS[name].mixed_ranks]
EXACT = ["flora", "fedex-lora", "ffa-lora", "rolora", "fedsvd", "fed-sb", "florist", "flexlora"]


def started(name, seed=0, rounds=1, max_rank=None):
    """An aggregator, and its state after some rounds of training."""
    aggregator = make_aggregator(name, max_rank=max_rank)
    state = aggregator.init(initial(seed=seed))
    for server_round in range(rounds):
        updates = play(name, aggregator, state, server_round=server_round, seed=seed)
        state = aggregator.aggregate(state, updates).state
    return aggregator, state


def exactness_error(name):
    """Largest relative error of the merged update over four rounds."""
    aggregator, state = started(name, rounds=0)
    errors = []
    for server_round in range(4):
        updates = play(name, aggregator, state, server_round=server_round)
        result = aggregator.aggregate(state, updates)
        errors.append(relative(merged(aggregator, result), weighted_mean(updates)))
        state = result.state
    return max(errors)


@pytest.mark.parametrize("name", EXACT)
def test_merged_update_of_exact_methods_is_the_weighted_mean(name):
    assert exactness_error(name) < 1e-6


@pytest.mark.parametrize("name", ["fedit", "hetlora"])
def test_merged_update_of_factor_averaging_is_not_the_weighted_mean(name):
    assert exactness_error(name) > 1e-2


@pytest.mark.parametrize("learning_rate", [1.0, 0.3])
def test_product_delta_without_truncation_adds_the_mean_change(learning_rate):
    aggregator = make_aggregator("product-delta", learning_rate=learning_rate)
    state = aggregator.init(initial(trained=True))
    for server_round in range(4):
        updates = play(
            "product-delta",
            aggregator,
            state,
            server_round=server_round,
            ranks=(2, 4, 7),
            scales=(4.0, 2.0, 0.5),
        )
        change = sum(
            (dense(update.returned) - dense(update.received)) * (update.weight / 8)
            for update in updates
        )
        expected = dense(aggregator.delta(state)) + learning_rate * change
        state = aggregator.aggregate(state, updates).state
        assert relative(dense(aggregator.delta(state)), expected) < 1e-6


def test_product_delta_first_round_is_the_weighted_mean():
    aggregator, state = started("product-delta", rounds=0)
    updates = play("product-delta", aggregator, state)
    found = merged(aggregator, aggregator.aggregate(state, updates))
    assert relative(found, weighted_mean(updates)) < 1e-6


def test_product_delta_truncation_is_the_nearest_of_its_rank():
    aggregator = make_aggregator("product-delta", max_rank=5)
    state = aggregator.init(initial())
    updates = play("product-delta", aggregator, state)
    found = aggregator.delta(aggregator.aggregate(state, updates).state)
    assert found.rank == 5
    assert relative(dense(found), best_of_rank(weighted_mean(updates), 5)) < 1e-6


@pytest.mark.parametrize("name", ["flexlora", "florist", "product-delta"])
def test_distributed_factors_have_the_eckart_young_error(name):
    aggregator, state = started(name, rounds=0)
    updates = play(name, aggregator, state)
    state = aggregator.aggregate(state, updates).state
    exact = weighted_mean(updates)
    spectrum = torch.linalg.svdvals(exact)
    for rank, scale in ((1, 1.0), (3, 8.0), (6, 0.25)):
        sent = aggregator.distribute(state, rank, scale)
        assert (sent.rank, sent.scale) == (rank, scale)
        error = float((exact - dense(sent)).norm())
        assert error == pytest.approx(float(spectrum[rank:].norm()), rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_florist_keeps_the_fewest_components_with_the_energy(tau):
    aggregator = make_aggregator("florist", tau=tau)
    state = aggregator.init(initial())
    updates = play("florist", aggregator, state)
    state = aggregator.aggregate(state, updates).state
    spectrum = torch.linalg.svdvals(weighted_mean(updates)).square()
    expected = next(p for p in range(1, 13) if spectrum[:p].sum() >= tau * spectrum.sum())
    assert aggregator.delta(state).rank == expected
    assert aggregator.distribute(state, 4).rank == 4


def identical_clients_error(name, rotate=False, **options):
    aggregator = make_aggregator(name, **options)
    state = aggregator.init(initial())
    errors = []
    for server_round in range(3):
        received = aggregator.distribute(state, 4, 2.0)
        returned = trained(name, server_round, received, generator(7 + server_round))
        copies = [returned] * 3
        if rotate:
            copies = []
            for index in range(3):
                turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator(index)))
                copies.append(Factors(turn.T @ returned.A, returned.B @ turn, returned.scale))
        updates = [Update(f"c{i}", received, copy, 1.0 + i) for i, copy in enumerate(copies)]
        result = aggregator.aggregate(state, updates)
        errors.append(relative(merged(aggregator, result), dense(returned)))
        state = result.state
    return max(errors)


@pytest.mark.parametrize("name", ALL)
def test_identical_clients_are_a_fixed_point(name):
    assert identical_clients_error(name) < 2e-6


def test_identical_clients_with_a_low_energy_share_are_no_fixed_point():
    assert identical_clients_error("florist", tau=0.5) > 1e-2


@pytest.mark.parametrize("name", ["flora", "flexlora", "florist", "fedex-lora", "product-delta"])
def test_rotated_copies_are_a_fixed_point_of_product_methods(name):
    assert identical_clients_error(name, rotate=True) < 2e-6


@pytest.mark.parametrize("name", ["fedit", "hetlora"])
def test_rotated_copies_are_no_fixed_point_of_factor_averaging(name):
    assert identical_clients_error(name, rotate=True) > 1e-2


def idle_round_error(name):
    """Change of the global ΔW in a round of mixed ranks in which nobody trains."""
    aggregator = make_aggregator(name, max_rank=6)
    state = aggregator.init(initial(rank=6, trained=True))
    updates = play(name, aggregator, state, ranks=(2, 4, 6), scales=(8.0, 4.0, 1.0))
    state = aggregator.aggregate(state, updates).state
    idle = play(name, aggregator, state, ranks=(2, 4, 6), scales=(8.0, 4.0, 1.0), size=0)
    after = aggregator.aggregate(state, idle).state
    return relative(dense(aggregator.delta(after)), dense(aggregator.delta(state)))


@pytest.mark.parametrize("name", ["product-delta", "raflora"])
def test_idle_round_of_mixed_ranks_changes_nothing(name):
    assert idle_round_error(name) < 1e-6


@pytest.mark.parametrize("name", ["flexlora"])
def test_idle_round_of_mixed_ranks_shrinks_flexlora(name):
    assert idle_round_error(name) > 1e-2


def test_idle_round_of_product_delta_is_bit_identical():
    aggregator = make_aggregator("product-delta", max_rank=6)
    state = aggregator.init(initial(rank=6, trained=True))
    idle = play("product-delta", aggregator, state, ranks=(2, 4, 6), size=0)
    after = aggregator.aggregate(state, idle).state
    assert torch.equal(after.factors.A, state.factors.A)
    assert torch.equal(after.factors.B, state.factors.B)


def ranks_of(name):
    return (2, 4, 4) if name in MIXED else (4, 4, 4)


@pytest.mark.parametrize("name", ALL)
def test_order_of_clients_changes_no_bit(name):
    aggregator, state = started(name)
    updates = play(name, aggregator, state, server_round=1, ranks=ranks_of(name))
    first = aggregator.aggregate(state, updates)
    second = aggregator.aggregate(state, [updates[2], updates[0], updates[1]])
    assert torch.equal(merged(aggregator, first), merged(aggregator, second))


@pytest.mark.parametrize("factor", [1e-300, 1e-6, 3, 1e12, 1e300])
@pytest.mark.parametrize("name", ALL)
def test_scaled_weights_change_nothing(name, factor):
    aggregator, state = started(name)
    updates = play(name, aggregator, state, server_round=1, ranks=ranks_of(name))
    scaled = [replace(update, weight=update.weight * factor) for update in updates]
    first = merged(aggregator, aggregator.aggregate(state, updates))
    assert relative(merged(aggregator, aggregator.aggregate(state, scaled)), first) < 1e-7


def split_client_error(name):
    """Change when one client becomes two of half its weight, and one of weight 0 joins."""
    aggregator, state = started(name)
    updates = play(name, aggregator, state, server_round=1, ranks=ranks_of(name))
    one = updates[1]
    stranger = trained(name, 1, one.received, generator(99), size=1.0)
    split = [
        updates[0],
        replace(one, client_id="client-1a", weight=one.weight / 2),
        replace(one, client_id="client-1b", weight=one.weight / 2),
        updates[2],
        Update("client-9", one.received, stranger, 0),
    ]
    first = merged(aggregator, aggregator.aggregate(state, updates))
    return relative(merged(aggregator, aggregator.aggregate(state, split)), first)


@pytest.mark.parametrize("name", [name for name in ALL if name != "hetlora"])
def test_client_split_in_two_halves_changes_nothing(name):
    assert split_client_error(name) < 1e-6


def test_client_split_in_two_halves_changes_hetlora():
    assert split_client_error("hetlora") > 1e-2


def gauge_error(name):
    """Change when every client's factors are turned by its own invertible matrix."""
    aggregator, state = started(name)
    updates = play(name, aggregator, state, server_round=1)
    turned = []
    for index, update in enumerate(updates):
        gauge = torch.eye(4) + 0.4 * torch.randn(4, 4, generator=generator(index)).clamp(-1, 1)
        own = update.returned
        turned.append(
            replace(
                update,
                returned=Factors(
                    torch.linalg.solve(gauge.double(), own.A.double()),
                    own.B.double() @ gauge.double(),
                    own.scale,
                ),
            )
        )
    for before, after in zip(updates, turned, strict=True):
        assert relative(dense(after.returned), dense(before.returned)) < 1e-6
    first = merged(aggregator, aggregator.aggregate(state, updates))
    return relative(merged(aggregator, aggregator.aggregate(state, turned)), first)


@pytest.mark.parametrize("name", ["flora", "flexlora", "florist", "product-delta"])
def test_gauge_of_the_factors_does_not_matter_to_product_methods(name):
    assert gauge_error(name) < 2e-6


@pytest.mark.parametrize("name", ["fedit", "hetlora", "lora-fair"])
def test_gauge_of_the_factors_matters_to_factor_methods(name):
    assert gauge_error(name) > 1e-2


@pytest.mark.parametrize("name", ["flora", "flexlora", "florist", "product-delta"])
def test_mixed_ranks_and_scales_merge_exactly(name):
    aggregator, state = started(name, rounds=0)
    updates = play(name, aggregator, state, ranks=(1, 4, 9), scales=(16.0, 2.0, 0.7))
    result = aggregator.aggregate(state, updates)
    assert relative(merged(aggregator, result), weighted_mean(updates)) < 1e-6


@pytest.mark.parametrize("name", [name for name in ALL if name not in MIXED])
def test_mixed_ranks_are_refused_and_name_the_client(name):
    aggregator, state = started(name, rounds=0)
    updates = play(name, aggregator, state)
    other = initial(rank=2)
    updates[1] = Update("client-1", other, other, 1.0)
    with pytest.raises(AggregationError, match=r"'client-1'.*rank 2"):
        aggregator.aggregate(state, updates)
    with pytest.raises(AggregationError, match="rank 2"):
        aggregator.distribute(state, 2, 2.0)


def test_mixed_scales_are_refused_by_fedit():
    aggregator, state = started("fedit", rounds=0)
    updates = play("fedit", aggregator, state)
    own = updates[2].returned
    updates[2] = replace(updates[2], returned=Factors(own.A, own.B / 2, own.scale * 2))
    with pytest.raises(AggregationError, match="'client-2' has 4.0"):
        aggregator.aggregate(state, updates)


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "fedsvd", "fed-sb", "fedex-lora"])
def test_mixed_scales_at_one_rank_merge_exactly(name):
    aggregator, state = started(name, rounds=0)
    updates = play(name, aggregator, state, scales=(1.0, 2.0, 7.0))
    result = aggregator.aggregate(state, updates)
    assert relative(merged(aggregator, result), weighted_mean(updates)) < 1e-6


def projection_on_rows(a):
    q, _ = torch.linalg.qr(a.double().T)
    return q @ q.T


def test_lora_fair_without_penalty_points_to_the_projection_of_the_mean_on_the_rows_of_mean_a():
    aggregator = make_aggregator("lora-fair", penalty=0.0)
    _, state = started("lora-fair")
    updates = play("lora-fair", aggregator, state, server_round=1)
    mean_a = sum(update.returned.A.double() * (update.weight / 8) for update in updates)
    expected = weighted_mean(updates) @ projection_on_rows(mean_a)
    found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
    ratio = float((found * expected).sum() / expected.square().sum())
    assert relative(found, ratio * expected) < 1e-6
    assert 0.8 < ratio < 1.2
    plain = make_aggregator("fedit").aggregate(state, updates).state.factors
    assert relative(found, weighted_mean(updates)) < relative(dense(plain), weighted_mean(updates))


def test_raflora_averages_each_component_over_the_clients_that_have_it():
    aggregator = make_aggregator("raflora", max_rank=IN)
    state = aggregator.init(initial(rank=6))
    updates = play("raflora", aggregator, state, ranks=(2, 4, 6), weights=(3, 1, 4))
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for p in range(6):
        holders = (0, 1, 2) if p < 2 else (1, 2) if p < 4 else (2,)
        total = sum(updates[i].weight for i in holders)
        for i in holders:
            own = updates[i].returned
            part = torch.outer(own.B[:, p].double(), own.A[p].double())
            expected += own.scale * part * (updates[i].weight / total)
    found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
    assert relative(found, expected) < 1e-6


def test_hetlora_weights_padded_factors_by_the_size_of_the_update():
    aggregator = make_aggregator("hetlora")
    state = aggregator.init(initial(rank=5))
    updates = play("hetlora", aggregator, state, ranks=(2, 5, 3), scales=(2.0, 2.0, 2.0))
    norms = [float(dense(update.returned).norm()) for update in updates]
    a, b = torch.zeros(5, IN, dtype=torch.float64), torch.zeros(OUT, 5, dtype=torch.float64)
    for update, norm in zip(updates, norms, strict=True):
        rank = update.returned.rank
        a[:rank] += update.returned.A.double() * (norm / sum(norms))
        b[:, :rank] += update.returned.B.double() * (norm / sum(norms))
    found = aggregator.aggregate(state, updates).state.factors
    assert relative(found.A.double(), a) < 1e-6
    assert relative(found.B.double(), b) < 1e-6


def test_fedsvd_keeps_orthonormal_rows_in_the_first_row_space():
    aggregator, state = started("fedsvd", rounds=3)
    a = aggregator.delta(state).A.double()
    assert torch.allclose(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert relative(a @ projection_on_rows(initial().A), a) < 1e-6


def test_fedsvd_of_a_weight_of_few_rows_keeps_all_rows_of_a_trainable():
    aggregator, rng = make_aggregator("fedsvd"), generator(1)
    state = aggregator.init(Factors(torch.randn(5, 30, generator=rng), torch.zeros(2, 5), 2.0))
    sent = aggregator.distribute(state)
    returned = trained("fedsvd", 0, sent, rng)
    a = aggregator.aggregate(state, [Update(0, sent, returned, 1)]).state.factors.A.double()
    assert torch.allclose(a @ a.T, torch.eye(5, dtype=torch.float64), atol=1e-6)


def test_rolora_trains_b_first_and_then_alternates():
    aggregator, state = started("rolora", rounds=0)
    assert aggregator.trainable(state) == {"B"}
    _, state = started("rolora", rounds=1)
    assert aggregator.trainable(state) == {"A"}


def test_fedsa_never_distributes_a_clients_b():
    aggregator, state = started("fedsa-lora", rounds=0)
    updates = play("fedsa-lora", aggregator, state)
    result = aggregator.aggregate(state, updates)
    sent = aggregator.distribute(result.state, 4, 2.0)
    assert torch.equal(sent.B, initial().B)
    mean_a = sum(update.returned.A.double() * (update.weight / 8) for update in updates)
    assert relative(sent.A.double(), mean_a) < 1e-6
    assert aggregator.private == {"B"}


def test_fed_sb_keeps_its_subspaces_after_the_second_round():
    aggregator, state = started("fed-sb", rounds=2)
    rows = projection_on_rows(aggregator.delta(state).A)
    columns = projection_on_rows(aggregator.delta(state).B.T)
    updates = play("ffa-lora", aggregator, state, server_round=2)  # B moves freely
    found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
    assert relative(found, columns @ weighted_mean(updates) @ rows) < 1e-6


def test_flora_starts_again_from_new_rows_every_round():
    aggregator, state = started("flora", rounds=1)
    sent = aggregator.distribute(state, 4, 2.0)
    assert not sent.B.any()
    assert sent.A.abs().sum() > 0
    _, later = started("flora", rounds=2)
    assert not torch.equal(sent.A, aggregator.distribute(later, 4, 2.0).A)


@pytest.mark.parametrize("name", ALL)
def test_distribute_before_the_first_round_is_the_initial_adapter(name):
    aggregator, state = started(name, rounds=0)
    sent = aggregator.distribute(state, 4, 2.0)
    assert torch.equal(sent.A, initial().A)
    assert torch.equal(sent.B, initial().B)


@pytest.mark.parametrize("name", ALL)
def test_round_with_b_zero_stays_finite_and_trainable(name):
    aggregator, state = started(name, rounds=0)
    updates = play(name, aggregator, state, size=0)
    result = aggregator.aggregate(state, updates)
    assert torch.equal(merged(aggregator, result), torch.zeros(OUT, IN, dtype=torch.float64))
    sent = aggregator.distribute(result.state, 4, 2.0)
    assert torch.isfinite(sent.A).all()
    assert (sent.A.norm(dim=1) > 0.1).all()  # a row of zeros with B = 0 would never train again


@pytest.mark.parametrize("name", MIXED)
def test_client_of_more_rank_than_the_server_gets_trainable_rows(name):
    aggregator, state = started(name, max_rank=4)
    sent = aggregator.distribute(state, 9, 2.0)
    same = aggregator.distribute(state, 9, 2.0)
    assert sent.rank == 9
    assert (sent.A.norm(dim=1) > 0.05).all()
    assert torch.equal(sent.A, same.A)
    assert relative(dense(sent), dense(aggregator.delta(state))) < 1e-6


@pytest.mark.parametrize(("out", "into"), [(2, 30), (30, 2), (1, 1)])
@pytest.mark.parametrize("name", ALL)
def test_rank_above_the_size_of_the_weight_keeps_its_shape_and_stays_finite(name, out, into):
    rng = generator(1)
    aggregator = make_aggregator(name)
    start = Factors(torch.randn(5, into, generator=rng), torch.zeros(out, 5), 2.0)
    state = aggregator.init(start)
    for server_round in range(3):
        received = aggregator.distribute(state, 5, 2.0)
        assert (received.A.shape, received.B.shape) == ((5, into), (out, 5))
        updates = [
            Update(i, received, trained(name, server_round, received, rng), 1 + i) for i in range(3)
        ]
        result = aggregator.aggregate(state, updates)
        state = result.state
        for factors in (aggregator.delta(state), result.residual or received):
            assert torch.isfinite(factors.A).all()
            assert torch.isfinite(factors.B).all()


def test_update_that_undoes_everything_leaves_no_rounding_noise_behind():
    aggregator = make_aggregator("product-delta")
    state = aggregator.init(initial(trained=True))
    sent = aggregator.distribute(state, 4, 2.0)
    undone = Factors(sent.A, torch.zeros_like(sent.B), 2.0)
    updates = [Update(i, sent, undone, 1) for i in range(3)]
    after = aggregator.aggregate(state, updates).state
    assert aggregator.delta(after).rank == 0
    assert torch.equal(aggregator.distribute(after, 4, 2.0).A, initial().A)


def test_product_delta_adds_a_late_clients_own_change_to_what_came_meanwhile():
    aggregator, state = started("product-delta", rounds=1)
    late = play("product-delta", aggregator, state, server_round=1, seed=5)[0]
    meanwhile = play("product-delta", aggregator, state, server_round=1)
    newer = aggregator.aggregate(state, meanwhile).state
    found = aggregator.aggregate(newer, [late]).state
    expected = dense(aggregator.delta(newer)) + dense(late.returned) - dense(late.received)
    assert relative(dense(aggregator.delta(found)), expected) < 1e-6
