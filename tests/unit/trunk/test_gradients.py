"""One client's gradient, however large or wrong, and what becomes of the others'."""

import contextlib
import math
import time

import pytest
import torch

from flower_split.aggregation.rules.parse import parse_rules
from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.trunk.compute.gradients import Reduction, SlotGradient, outliers
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan


def slot(values: list[float], tokens: float = 1.0, denominator: float | None = None):
    gradient = SlotGradient()
    gradient.add(
        0,
        [torch.tensor(values), None],
        num_tokens=tokens,
        loss_denominator=tokens if denominator is None else denominator,
    )
    return gradient


def reduced(slots, text: str = "", max_client_norm: float = 0.0) -> list[float]:
    reduction = Reduction(max_client_norm=max_client_norm, rules=parse_rules(text))
    result = reduction(slots)
    assert result[1] is None
    return result[0].tolist()


def test_reduction_without_rules_is_the_token_weighted_mean():
    assert reduced({0: slot([1.0, 0.0], 1.0), 1: slot([5.0, 4.0], 3.0)}) == [4.0, 3.0]


def test_reduction_clips_a_long_gradient_and_leaves_a_short_one():
    # [3, 4] has norm 5 and is clipped to 1; [0.5, 0] stays. Tokens 1 and 3.
    got = reduced({0: slot([3.0, 4.0], 1.0), 1: slot([0.5, 0.0], 3.0)}, max_client_norm=1.0)
    assert got == pytest.approx([(0.6 + 1.5) / 4, 0.8 / 4])


def test_reduction_clips_the_mean_over_tokens_whatever_the_denominator():
    # A sum-of-losses gradient (denominator 1) of 10 tokens: its token mean is [0.3, 0.4], norm 0.5.
    got = reduced({0: slot([3.0, 4.0], 10.0, denominator=1.0)}, max_client_norm=0.25)
    assert got == pytest.approx([0.15, 0.2])


def test_reduction_with_five_clients_and_one_far_off():
    slots = {i: slot([float(i), -float(i)], tokens=1.0 + i) for i in range(4)}
    slots[4] = slot([1e6, 1e6])
    # By coordinate: 0 1 2 3 1e6 and 1e6 0 -1 -2 -3.
    assert reduced(slots, "median") == [2.0, -1.0]
    assert reduced(slots, "trimmed-mean=0.2") == [2.0, -1.0]
    # Krum, f = 1: the two nearest of the others, distances 2 d²: slot 1 (2 + 2), slot 2 (2 + 2).
    assert reduced(slots, "krum=1") == [1.0, -1.0]


def test_reduction_that_cannot_work_on_so_few_clients_aborts_the_round_in_words():
    trunk_engine = make_engine(reduction=Reduction(rules=parse_rules("krum=1")))
    trunk_engine.begin_round(make_plan((0, 1)))
    for number in (0, 1):
        client = ToyClient(trunk_engine, number)
        client.forward(torch.ones(1, 2, HIDDEN))
        client.backward(torch.ones(1, 2, HIDDEN))
    with pytest.raises(RoundAborted, match="krum .*needs at least 5 clients"):
        trunk_engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    trunk_engine.close()


def test_nan_from_one_of_eight_clients_is_refused_by_name_and_the_others_go_on():
    engine = make_engine()
    engine.begin_round(make_plan(tuple(range(8)), quorum=0.75))
    clients = [ToyClient(engine, number) for number in range(8)]
    hidden = torch.ones(1, 2, HIDDEN)
    for number, client in enumerate(clients):
        client.forward(hidden * (number + 1))
    for number, client in enumerate(clients):
        if number == 5:
            with pytest.raises(TrunkRefused, match="slot 5.*NaN") as info:
                client.backward(hidden * math.nan)
            assert info.value.reason is RefusalReason.NON_FINITE
            client.close()  # as a client does whose training has failed
        else:
            client.backward(hidden)
    report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    assert [item.slot for item in report.slots if not item.completed] == [5]
    # h^T g with h = k and g = 1 over two positions: 2 k in every entry; mean over the seven left.
    mean = sum(2.0 * (number + 1) for number in range(8) if number != 5) / 7
    torch.testing.assert_close(engine.adapter()["weight"], ToyTrunk().weight.detach() - 0.5 * mean)
    engine.close()


def final_loss(scale: float, *, clip: float, leave_out: bool = False) -> float:
    """Eight clients fit ``h @ W`` to their targets; client 0's gradients are scaled by ``scale``.

    Returns the loss over the seven others.
    """
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.2, max_grad_norm=0.0)
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(HIDDEN, HIDDEN, generator=generator)
    data = {n: torch.randn(1, 16, HIDDEN, generator=generator) for n in range(8)}
    noise = {n: 0.3 * torch.randn(1, 16, HIDDEN, generator=generator) for n in range(8)}
    members = tuple(n for n in range(8) if not (leave_out and n == 0))
    steps = 120
    reduction = Reduction(max_client_norm=clip)
    with contextlib.closing(make_engine(optimizer=optimizer, reduction=reduction)) as engine:
        engine.begin_round(make_plan(members, steps_per_round=steps))
        clients = {n: ToyClient(engine, n, steps) for n in members}
        for step in range(steps):
            for n, client in clients.items():
                output = client.forward(data[n], step).tensor
                grad = (output - data[n] @ wanted - noise[n]) / 16
                client.backward(grad * (scale if n == 0 else 1.0), step, num_tokens=16.0)
        weight = engine.adapter()["weight"]
    errors = [data[n] @ weight - data[n] @ wanted - noise[n] for n in range(1, 8)]
    return float(torch.stack(errors).detach().square().mean())


def test_gradient_scaled_by_a_million_with_clipping_costs_at_most_5_percent():
    without = final_loss(1.0, clip=0.3, leave_out=True)
    with_it = final_loss(1e6, clip=0.3)
    assert with_it <= 1.05 * without
    with pytest.raises(RoundAborted, match="slot 0: the largest entry"):  # without clipping
        final_loss(1e6, clip=0.0)


def test_norm_far_above_the_median_of_three_is_an_outlier():
    slots = {0: slot([3.0, 4.0]), 1: slot([6.0, 8.0]), 2: slot([0.0, 101.0])}  # norms 5, 10, 101
    assert outliers(slots, 10.2) == {}
    assert list(outliers(slots, 10.0)) == [2]
    assert "10.1 times the median" in outliers(slots, 10.0)[2]
    assert outliers(slots, 0.0) == {}


def test_outlier_depends_neither_on_order_nor_on_the_denominator():
    slots = {0: slot([30.0], denominator=0.1), 1: slot([2.0]), 2: slot([0.03], denominator=100.0)}
    assert outliers(slots, 1.5) == {}  # norms 3, 2 and 3
    far = {2: slot([90.0]), 0: slot([1.0]), 1: slot([2.0]), 3: slot([80.0])}
    assert list(outliers(far, 1.1)) == [2]  # the larger of the middle two, 80
    assert outliers(far, 1.1) == outliers(dict(sorted(far.items())), 1.1)


def test_two_clients_have_no_outlier_and_neither_do_zeros():
    assert outliers({0: slot([1.0]), 1: slot([1e9])}, 2.0) == {}
    assert outliers({0: slot([0.0]), 1: slot([0.0]), 2: slot([1e9])}, 2.0) == {}


def test_gradient_of_few_tokens_is_compared_as_it_counts():
    # 1 of 10 tokens: its norm of 50 moves the step as 5 over 10 tokens would.
    few = {0: slot([1.0], 10.0), 1: slot([1.0], 10.0), 2: slot([50.0], 1.0)}
    assert outliers(few, 6.0) == {}
    assert list(outliers(few, 4.0)) == [2]


def test_norm_whose_squares_overflow_fp32_is_an_outlier():
    assert list(outliers({0: slot([1.0]), 1: slot([1.0]), 2: slot([1e25])}, 100.0)) == [2]
