"""Every method against its paper's formula on dense fp64 matrices; see tests/support/paper_formulas."""

import numpy as np
import pytest
import torch

from flower_split.aggregation import METHODS, Factors, Update, make_aggregator
from flower_split.aggregation.methods.description import method_table
from flower_split.errors import AggregationError
from tests.support import paper_formulas as paper
from tests.support.dense_reference import IN, OUT, dense, generator, initial, play

RANKS = (2, 4, 6)


def round_of(name, *, rounds=1, ranks=(4, 4, 4), rank=4, **options):
    """A method after some rounds of training, and the updates of the next one."""
    aggregator = make_aggregator(name, **options)
    state = aggregator.init(initial(rank=rank))
    for server_round in range(rounds):
        updates = play(name, aggregator, state, server_round=server_round, ranks=ranks)
        state = aggregator.aggregate(state, updates).state
    return aggregator, state, play(name, aggregator, state, server_round=rounds, ranks=ranks)


def test_fedit_is_the_mean_of_the_factors():
    aggregator, state, updates = round_of("fedit")
    b, a = paper.fedit(paper.clients(updates))
    found = aggregator.aggregate(state, updates).state.factors
    assert paper.error(found.B, b) < 1e-6
    assert paper.error(found.A, a) < 1e-6


def test_ffa_lora_is_the_mean_of_b_at_the_first_a():
    aggregator, state, updates = round_of("ffa-lora")
    b, _ = paper.fedit(paper.clients(updates))
    found = aggregator.aggregate(state, updates).state.factors
    assert paper.error(found.B, b) < 1e-6
    assert torch.equal(found.A, initial().A)


def test_rolora_is_the_mean_of_the_factor_of_the_round():
    for rounds, part in ((0, 0), (1, 1), (2, 0)):
        aggregator, state, updates = round_of("rolora", rounds=rounds)
        means = paper.fedit(paper.clients(updates))
        found = aggregator.aggregate(state, updates).state.factors
        assert paper.error((found.B, found.A)[part], means[part]) < 1e-6
        kept = (found.A, found.B)[part], (state.factors.A, state.factors.B)[part]
        assert torch.equal(*kept)


def test_fedsa_lora_is_the_mean_of_a():
    aggregator, state, updates = round_of("fedsa-lora")
    _, a = paper.fedit(paper.clients(updates))
    sent = aggregator.distribute(aggregator.aggregate(state, updates).state, 4, 2.0)
    assert paper.error(sent.A, a) < 1e-6


def test_flora_puts_the_stacked_modules_into_the_base():
    aggregator, state, updates = round_of("flora", ranks=RANKS)
    result = aggregator.aggregate(state, updates)
    assert paper.error(dense(result.residual), paper.flora(paper.clients(updates))) < 1e-6
    assert not dense(aggregator.delta(result.state)).any()


def test_flexlora_sends_the_leading_components_of_the_mean():
    aggregator, state, updates = round_of("flexlora", ranks=RANKS)
    state = aggregator.aggregate(state, updates).state
    for rank in RANKS:
        expected = paper.svd_top(paper.fedavg(paper.clients(updates)), rank)
        assert paper.error(dense(aggregator.distribute(state, rank, 2.0)), expected) < 1e-6


@pytest.mark.parametrize("tau", [0.8, 0.9, 0.99, 1.0])
def test_florist_is_the_thresholded_svd_of_the_stacks(tau):
    aggregator, state, updates = round_of("florist", ranks=RANKS, tau=tau)
    found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
    assert paper.error(found, paper.florist(paper.clients(updates), tau)) < 1e-6


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5])
def test_hetlora_prunes_pads_and_weighs_by_the_size_of_the_update(gamma):
    aggregator, state, updates = round_of("hetlora", rounds=2, ranks=RANKS, rank=6, gamma=gamma)
    shrunk = updates[2].returned
    b = shrunk.B.clone()
    b[:, 3:] *= 0.01  # this client's tail became smaller: it prunes itself
    updates[2] = Update("client-2", updates[2].received, Factors(shrunk.A, b, 2.0), 2.0)
    sent, back = paper.clients(updates, "received"), paper.clients(updates)
    expected_b, expected_a = paper.hetlora(sent, back, gamma, 6)
    found = aggregator.aggregate(state, updates).state.factors
    assert paper.error(found.B, expected_b) < 1e-6
    assert paper.error(found.A, expected_a) < 1e-6
    unpruned = paper.hetlora(sent, back, 1.0, 6)[1]
    assert (paper.error(found.A, unpruned) > 1e-3) == (gamma < 1)


def test_fedex_lora_puts_the_residual_into_the_base():
    aggregator, state, updates = round_of("fedex-lora")
    b, a = paper.fedit(paper.clients(updates))
    result = aggregator.aggregate(state, updates)
    assert paper.error(result.state.factors.B, b) < 1e-6
    assert paper.error(result.state.factors.A, a) < 1e-6
    expected = paper.fedex_residual(paper.clients(updates))
    assert paper.error(dense(result.residual), expected) < 1e-6


def descended(group, penalty):
    """ΔB by gradient descent with halved steps from near 0, on the dense objective."""
    mean_b, _ = paper.fedit(group)
    residual = -1e-6 * paper.lora_fair_objective(group, np.zeros_like(mean_b), 0.0)[1]
    rate = 1.0
    value, slope = paper.lora_fair_objective(group, residual, penalty)
    for _ in range(5000):
        trial = residual - rate * slope
        new, new_slope = paper.lora_fair_objective(group, trial, penalty)
        if new <= value - 0.5 * rate * float(np.sum(slope**2)):
            residual, value, slope, rate = trial, new, new_slope, rate * 1.5
        else:
            rate /= 2
        if rate < 1e-13 or float(np.linalg.norm(slope)) < 1e-7:
            break
    return residual, value


@pytest.mark.parametrize("penalty", [0.03, 0.01, 0.003])
def test_lora_fair_is_the_minimum_of_the_papers_objective(penalty):
    aggregator, state, _ = round_of("lora-fair", penalty=penalty)
    updates = play("lora-fair", aggregator, state, server_round=1, size=0.6)
    group = paper.clients(updates)
    mean_b, _ = paper.fedit(group)
    expected, lowest = descended(group, penalty)
    found = aggregator.aggregate(state, updates).state.factors.B.double().numpy() - mean_b
    value, slope = paper.lora_fair_objective(group, found, penalty)
    assert value <= lowest + 1e-8
    assert np.linalg.norm(slope) < 1e-7
    assert paper.error(found, expected) < 1e-3  # how far descent has come
    assert value < paper.lora_fair_objective(group, 0 * mean_b, penalty)[0] - 1e-3


def test_lora_fair_corrects_nothing_where_it_costs_more_than_it_gains():
    aggregator, state, updates = round_of("lora-fair", penalty=1e3)
    b, _ = paper.fedit(paper.clients(updates))
    assert paper.error(aggregator.aggregate(state, updates).state.factors.B, b) < 1e-6


def test_fedsvd_is_the_svd_of_the_mean_of_b():
    aggregator, state, updates = round_of("fedsvd")
    b, a = paper.fedsvd(paper.clients(updates), state.factors.A.double().numpy())
    found = aggregator.aggregate(state, updates).state.factors
    signs = np.sign(np.sum(found.A.double().numpy() * a, axis=1))  # of singular vectors: free
    assert paper.error(found.A, a * signs[:, None]) < 1e-6
    assert paper.error(found.B, b * signs) < 1e-6


def test_raflora_averages_each_partition_of_ranks_over_its_holders():
    aggregator, state, updates = round_of("raflora", ranks=RANKS, rank=6)
    expected = paper.raflora(paper.clients(updates))
    found = aggregator.aggregate(state, updates).state
    for rank in RANKS:
        sent = dense(aggregator.distribute(found, rank, 2.0))
        assert paper.error(sent, paper.svd_top(expected, rank)) < 1e-6


def test_product_delta_adds_the_mean_change():
    aggregator, state, updates = round_of("product-delta", ranks=RANKS)
    change = paper.fedavg(paper.clients(updates)) - paper.fedavg(paper.clients(updates, "received"))
    expected = dense(aggregator.delta(state)).numpy() + change
    found = dense(aggregator.delta(aggregator.aggregate(state, updates).state))
    assert paper.error(found, expected) < 1e-6


def test_fed_sb_averages_the_cores_between_what_the_svd_of_two_rounds_gave():
    aggregator = make_aggregator("fed-sb")
    state = aggregator.init(initial())
    for server_round in range(2):
        assert aggregator.core_columns(state) is None
        assert aggregator.trainable(state) == {"BA"[server_round]}
        updates = play("fed-sb", aggregator, state, server_round=server_round)
        state = aggregator.aggregate(state, updates).state
    u, s, vt = np.linalg.svd(paper.fedavg(paper.clients(updates)))
    p = aggregator.core_columns(state).double().numpy()
    sent = aggregator.distribute(state)
    a, core = sent.A.double().numpy(), p.T @ sent.B.double().numpy()
    assert np.allclose(p.T @ p, np.eye(4), atol=1e-6)
    assert np.allclose(a @ a.T, np.eye(4), atol=1e-6)
    # B = U[:, :r], A = V[:r], R = S / s: the paper's initialisation, up to the signs of the SVD.
    assert np.allclose(np.abs(u[:, :4].T @ p), np.eye(4), atol=1e-5)
    assert np.allclose(np.abs(vt[:4] @ a.T), np.eye(4), atol=1e-5)
    assert np.allclose(np.abs(core), np.diag(s[:4] / 2.0), atol=1e-5)
    rng = generator(3)
    returned = [core + torch.randn(4, 4, generator=rng).double().numpy() for _ in range(3)]
    updates = [
        Update(i, sent, Factors(sent.A, torch.from_numpy(p @ r), 2.0), 1.0 + i)
        for i, r in enumerate(returned)
    ]
    expected = sum((1 + i) / 6 * r for i, r in enumerate(returned))
    after = aggregator.aggregate(state, updates).state
    assert np.array_equal(aggregator.core_columns(after).numpy(), p.astype(np.float32))
    sent = aggregator.distribute(after)
    assert paper.error(p.T @ sent.B.double().numpy(), expected) < 1e-6
    assert paper.error(sent.A, a) < 1e-7


@pytest.mark.parametrize("optimizer", ["adam", "yogi", "adagrad"])
@pytest.mark.parametrize("name", ["product-delta", "flexlora"])
def test_adaptive_server_is_algorithm_2_on_every_entry_of_the_delta(name, optimizer):
    options = {"beta1": 0.8, "beta2": 0.95, "epsilon": 2e-3}
    server = paper.AdaptiveServer(optimizer, 0.01, 0.8, 0.95, 2e-3)
    aggregator = make_aggregator(name, learning_rate=0.01, server_optimizer=optimizer, **options)
    state = aggregator.init(initial())
    weights = np.zeros((OUT, IN))
    for server_round in range(4):
        updates = play(name, aggregator, state, server_round=server_round, ranks=(3, 4, 6))
        mean = paper.fedavg(paper.clients(updates))
        sent = paper.fedavg(paper.clients(updates, "received"))
        weights = weights + server.step(mean - (sent if name == "product-delta" else weights))
        state = aggregator.aggregate(state, updates).state
        assert paper.error(dense(aggregator.delta(state)), weights) < 1e-6


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_its_paper_and_what_it_does_otherwise(name):
    method = METHODS[name]
    assert method.exactness
    assert method.paper or name == "product-delta"


def test_table_of_methods_has_a_line_of_every_method_with_its_deviation():
    lines = method_table(METHODS.values()).splitlines()
    for name, method in METHODS.items():
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert line.count("|") == 5
        assert (method.deviation or "–") in line


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("hetlora", "gamma", 0.0),
        ("hetlora", "gamma", 1.1),
        ("lora-fair", "penalty", -0.1),
        ("lora-fair", "penalty", float("nan")),
    ],
)
def test_options_of_a_paper_out_of_their_range_are_refused(name, option, value):
    with pytest.raises(AggregationError, match=f"{name}'s {option} must be"):
        make_aggregator(name, **{option: value})
