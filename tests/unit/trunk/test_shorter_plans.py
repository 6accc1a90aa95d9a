"""Clients that stop early and say so, on a trunk whose gradients are worked out by hand."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import FinishRule, RoundReport
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan

RATE = 0.5


@pytest.fixture
def engine() -> Iterator[TrunkEngine]:
    engine = make_engine()
    yield engine
    engine.close()


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))


def weight_gradient(seed: int) -> torch.Tensor:
    """dL/dW of ``h @ W`` for what :func:`contribute` sends, by hand; it does not depend on W."""
    return batch(seed).reshape(-1, HIDDEN).T @ batch(seed + 100).reshape(-1, HIDDEN)


def contribute(client: ToyClient, seed: int, window: int, *, tokens: float = 1.0) -> None:
    client.forward(batch(seed), window)
    client.backward(batch(seed + 100), window, num_tokens=tokens)


def prepare(engine: TrunkEngine) -> RoundReport:
    return engine.prepare_round("test", 1, 0, time.monotonic() + 20)


def test_one_of_two_clients_stops_after_two_of_five_steps_and_the_other_goes_on(engine):
    engine.begin_round(make_plan(steps_per_round=5))
    clients = [ToyClient(engine, slot, steps=5) for slot in (0, 1)]
    for window in range(2):
        contribute(clients[0], window, window, tokens=3.0)
        contribute(clients[1], 10 + window, window)
    clients[0].shorten_plan(2)
    clients[0].shorten_plan(2)  # a retry
    for window in range(2, 5):
        contribute(clients[1], 10 + window, window)
    report = prepare(engine)
    assert report.optimizer_steps == 5
    assert [(item.completed, item.contributions) for item in report.slots] == [(True, 2), (True, 5)]
    expected = ToyTrunk().weight.detach().clone()
    for window in range(5):
        both = (3 * weight_gradient(window) + weight_gradient(10 + window)) / 4
        expected -= RATE * (both if window < 2 else weight_gradient(10 + window))
    torch.testing.assert_close(engine.adapter()["weight"], expected)


def test_the_only_client_stops_early_and_its_steps_are_kept(engine):
    engine.begin_round(make_plan((0,), steps_per_round=5))
    client = ToyClient(engine, 0, steps=5)
    for window in range(2):
        contribute(client, window, window)
    client.shorten_plan(2)
    assert engine.status().phase == "done"
    client.close()
    report = prepare(engine)
    engine.commit_round("test", 1, 0)
    assert report.optimizer_steps == 2 and report.slots[0].completed
    expected = ToyTrunk().weight.detach() - RATE * (weight_gradient(0) + weight_gradient(1))
    torch.testing.assert_close(engine.adapter()["weight"], expected)


def test_a_window_that_waits_for_the_one_who_stops_goes_on_at_once(engine):
    """With a step that it has begun and does not finish, which does not count."""
    rule = FinishRule(max_grad_norm=1e9)
    engine.begin_round(make_plan(steps_per_round=5, finish=rule))
    clients = [ToyClient(engine, slot, steps=5) for slot in (0, 1)]
    with ThreadPoolExecutor(1) as pool:
        for slot in (0, 1):
            contribute(clients[slot], slot, 0)
        ended = pool.submit(clients[1].finish_step)
        clients[0].finish_step()
        ended.result(timeout=20)
        clients[0].forward(batch(5), 1)
        clients[0].backward(batch(105), 1, last=False)
        contribute(clients[1], 6, 1)
        ended = pool.submit(clients[1].finish_step, 1)
        clients[0].shorten_plan(1)
        assert ended.result(timeout=20).version == 2
    both = (weight_gradient(0) + weight_gradient(1)) / 2
    expected = ToyTrunk().weight.detach() - RATE * (both + weight_gradient(6))
    torch.testing.assert_close(engine.adapter()["weight"], expected)


def test_in_a_round_of_one_step_what_was_sent_is_all_that_counts(engine):
    engine.begin_round(make_plan((0, 1), step_every=StepEvery.SERVER_ROUND))
    clients = [ToyClient(engine, slot, steps=3) for slot in (0, 1)]
    for slot, client in enumerate(clients):
        for index in range(3 - slot):  # the second one stops after two
            client.forward(batch(10 * slot + index), 0, index)
            client.backward(batch(100 + 10 * slot + index), 0, index, last=index == 2)
    clients[1].shorten_plan(2)
    report = prepare(engine)
    assert report.optimizer_steps == 1 and all(item.completed for item in report.slots)
    gradient = sum(weight_gradient(seed) for seed in (0, 1, 2, 10, 11)) / 5
    expected = ToyTrunk().weight.detach() - RATE * gradient
    torch.testing.assert_close(engine.adapter()["weight"], expected)


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_plan_of_fewer_than_done_or_more_than_planned_is_refused(engine, steps):
    engine.begin_round(make_plan((0,), steps_per_round=5))
    client = ToyClient(engine, 0, steps=5)
    for window in range(2):
        contribute(client, window, window)
    with pytest.raises(
        TrunkRefused, match=f"planned 5 steps, has done 2, and now plans {steps}"
    ) as no:
        client.shorten_plan(steps)
    assert no.value.reason is RefusalReason.INVALID_REQUEST
    contribute(client, 2, 2)  # nothing has changed


def test_a_plan_made_smaller_in_advance_ends_the_round_there(engine):
    engine.begin_round(make_plan((0,), steps_per_round=5))
    client = ToyClient(engine, 0, steps=5)
    client.shorten_plan(2)
    for window in range(2):
        contribute(client, window, window)
    assert engine.status().phase == "done"
    with pytest.raises(TrunkRefused, match="planned 2 windows"):
        client.forward(batch(2), 2)
