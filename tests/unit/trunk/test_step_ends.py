"""Steps that clients and trunk end together, on a trunk whose gradients are worked out by hand."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import pytest
import torch

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import FinishRule
from flower_split.trunk.compute.clipping import norm_faults
from flower_split.trunk.compute.gradients import Reduction
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_engine, make_plan

MAX_NORM, RATE = 0.5, 0.5


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))


def weight_gradient(slot: int) -> torch.Tensor:
    """dL/dW of ``h @ W`` for what ``slot`` contributes, by hand."""
    return batch(slot).reshape(-1, HIDDEN).T @ batch(slot + 100).reshape(-1, HIDDEN)


def contribute(client: ToyClient, slot: int, tokens: float, window: int = 0) -> None:
    client.forward(batch(slot), window)
    client.backward(batch(slot + 100), window, num_tokens=tokens)


def both(calls):
    """The results of two calls that wait for each other."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=20) for future in [pool.submit(call) for call in calls]]


def test_one_norm_over_trunk_and_clients_scales_everybodys_step(engine):
    engine.begin_round(make_plan(finish=FinishRule(max_grad_norm=MAX_NORM)))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    contribute(clients[0], 0, 2.0)
    contribute(clients[1], 1, 6.0)
    start = ToyTrunk().weight.detach()
    assert torch.equal(engine.adapter()["weight"], start)  # not before the steps have ended
    replies = both(
        [
            lambda: clients[0].finish_step(norm_squared=9.0),
            lambda: clients[1].finish_step(norm_squared=1.0),
        ]
    )
    gradient = (2 * weight_gradient(0) + 6 * weight_gradient(1)) / 8
    norm = math.sqrt(float(gradient.double().square().sum()) + (2 * 9.0 + 6 * 1.0) / 8)
    factor = MAX_NORM / (norm + 1e-6)
    assert factor < 0.9
    for reply in replies:
        assert reply.clip_factor == pytest.approx(factor, rel=1e-6)
        assert reply.grad_norm == pytest.approx(norm, rel=1e-6)
        assert reply.version == 1
    torch.testing.assert_close(engine.adapter()["weight"], start - RATE * factor * gradient)


def test_shared_gradients_come_back_as_their_token_mean_and_count_by_its_norm(engine):
    engine.begin_round(make_plan(finish=FinishRule(MAX_NORM, share_gradients=True)))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    contribute(clients[0], 0, 2.0)
    contribute(clients[1], 1, 6.0)
    given = [{"b": torch.tensor([4.0, 0.0])}, {"b": torch.tensor([0.0, 8.0])}]
    replies = both(
        [
            lambda: clients[0].finish_step(norm_squared=16.0, gradients=given[0]),
            lambda: clients[1].finish_step(norm_squared=64.0, gradients=given[1]),
        ]
    )
    for reply in replies:
        assert torch.equal(reply.gradients["b"], torch.tensor([1.0, 6.0]))  # (2·4/8, 6·8/8)
    trunk = (2 * weight_gradient(0) + 6 * weight_gradient(1)) / 8
    norm = math.sqrt(float(trunk.double().square().sum()) + 1.0 + 36.0)
    assert replies[0].grad_norm == pytest.approx(norm, rel=1e-6)


def test_a_repeated_finish_step_gets_the_same_reply_and_no_second_step(engine):
    engine.begin_round(make_plan((0,), finish=FinishRule(MAX_NORM, share_gradients=True)))
    client = ToyClient(engine, 0, steps=2)
    contribute(client, 0, 2.0)
    given = {"b": torch.tensor([4.0, 1.0])}
    first = client.finish_step(norm_squared=17.0, gradients=given)
    again = client.finish_step(norm_squared=17.0, gradients=given)
    assert again is first and engine.compute.version == 1
    with pytest.raises(TrunkRefused) as other:
        client.finish_step(norm_squared=17.5, gradients=given, digest=b"other")
    assert other.value.reason is RefusalReason.DIGEST_MISMATCH
    client.forward(batch(0), 1)  # says that it has the reply
    with pytest.raises(TrunkRefused) as late:
        client.finish_step(norm_squared=17.0, gradients=given)
    assert late.value.reason is RefusalReason.STALE_VERSION


def test_a_step_that_fails_on_the_trunk_is_told_to_everybody_who_waits(engine, monkeypatch):
    engine.begin_round(make_plan(finish=FinishRule(max_grad_norm=MAX_NORM)))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    for slot in (0, 1):
        contribute(clients[slot], slot, 2.0)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.compute, "step", fail)
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(client.finish_step, norm_squared=1.0, timeout=15.0) for client in clients
        ]
        for call in waiting:
            with pytest.raises(RoundAborted, match="out of memory"):
                call.result(timeout=10)


def test_a_client_that_never_ends_its_step_is_dropped_at_the_deadline():
    clock = Clock()
    engine = make_engine(clock=clock)
    try:
        rule = FinishRule(max_grad_norm=MAX_NORM)
        engine.begin_round(make_plan(finish=rule, quorum=0.5, window_seconds=30.0))
        clients = [ToyClient(engine, slot) for slot in (0, 1)]
        for slot in (0, 1):
            contribute(clients[slot], slot, 2.0)
        start = ToyTrunk().weight.detach()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(clients[0].finish_step, norm_squared=9.0, timeout=1e6)
            while not engine.inspect().num_replies >= 5:  # 2 forwards, 2 backwards, its FinishStep
                assert not waiting.done()
            with pytest.raises(FutureTimeout):  # its call is kept before its norm is: let it wait
                waiting.result(timeout=1.0)
            clock.now = 31.0
            engine.expire()
            reply = waiting.result(timeout=20)
        gradient = weight_gradient(0)  # of slot 0 alone
        norm = math.sqrt(float(gradient.double().square().sum()) + 9.0)
        factor = MAX_NORM / (norm + 1e-6)
        assert reply.clip_factor == pytest.approx(factor, rel=1e-6)
        torch.testing.assert_close(engine.adapter()["weight"], start - RATE * factor * gradient)
        with pytest.raises(TrunkRefused) as refused:
            clients[1].finish_step(norm_squared=1.0)
        assert refused.value.reason is RefusalReason.DROPPED
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("rule", "call", "reason"),
    [
        (FinishRule(1.0), {"num_micro_batches": 2}, RefusalReason.INVALID_REQUEST),
        (FinishRule(1.0), {"gradients": {"b": torch.ones(1)}}, RefusalReason.INVALID_REQUEST),
        (FinishRule(1.0, True), {}, RefusalReason.INVALID_REQUEST),
        (None, {}, RefusalReason.INVALID_REQUEST),
    ],
)
def test_what_cannot_end_a_step_is_refused_and_may_be_sent_again(engine, rule, call, reason):
    engine.begin_round(make_plan((0,), finish=rule))
    client = ToyClient(engine, 0)
    contribute(client, 0, 2.0)
    with pytest.raises(TrunkRefused) as refused:
        client.finish_step(**call)
    assert refused.value.reason is reason
    if rule is not None:
        good = {"gradients": {"b": torch.ones(1)}} if rule.share_gradients else {}
        assert client.finish_step(**good).version == 1


HOSTILE = 1
HOSTILE_ENDS = {
    "nan": {"norm_squared": math.nan},
    "negative": {"norm_squared": -1.0},
    "infinite": {"norm_squared": math.inf},
    "beyond all measure": {"norm_squared": 1e25},
    "stops everybody": {"norm_squared": 1e12},
    "shared nan": {"gradients": {"b": torch.tensor([math.nan, 0.0])}},
    "shared huge": {"gradients": {"b": torch.tensor([1e8, 0.0])}},
}


def round_of(slots, call, *, exclude_bad=True):
    """The weight after one step of ``slots``, whose hostile one ends it with ``call``, and replies."""
    engine = make_engine(reduction=Reduction(exclude_bad=exclude_bad))
    shared = "gradients" in call
    try:
        rule = FinishRule(MAX_NORM, share_gradients=shared)
        engine.begin_round(make_plan(slots, finish=rule, quorum=0.5))
        clients = {slot: ToyClient(engine, slot) for slot in slots}
        for slot, client in clients.items():
            contribute(client, slot, 2.0 + slot)
        good = {"gradients": {"b": torch.tensor([3.0, -1.0])}} if shared else {"norm_squared": 9.0}
        with ThreadPoolExecutor(len(slots)) as pool:
            calls = {
                slot: pool.submit(client.finish_step, **(call if slot == HOSTILE else good))
                for slot, client in clients.items()
            }
            results = {
                slot: future.exception(timeout=20) or future.result()
                for slot, future in calls.items()
            }
        over = engine.status().phase == "aborted"
        report = None if over else engine.prepare_round("test", 1, 0, time.monotonic() + 20)
        return engine.adapter()["weight"], results, report
    finally:
        engine.close()


@pytest.mark.parametrize("kind", HOSTILE_ENDS)
def test_a_hostile_end_takes_its_client_out_and_the_others_step_as_without_it(kind):
    call = HOSTILE_ENDS[kind]
    weight, results, report = round_of((0, HOSTILE, 2, 3), call)
    without, expected, _ = round_of((0, 2, 3), {**call})
    assert torch.equal(weight, without)
    refused = results.pop(HOSTILE)
    assert isinstance(refused, TrunkRefused) and refused.reason is RefusalReason.DROPPED
    for slot, reply in results.items():
        assert reply.clip_factor == expected[slot].clip_factor
    blamed = {item.slot: item.problem for item in report.slots if not item.completed}
    assert list(blamed) == [HOSTILE] and "grad_norm_squared" in blamed[HOSTILE]


def test_a_hostile_end_ends_the_round_where_nobody_is_to_be_excluded():
    _, results, report = round_of((0, HOSTILE, 2), HOSTILE_ENDS["nan"], exclude_bad=False)
    assert report is None
    assert all(isinstance(result, RoundAborted) for result in results.values())
    assert "slot 1: its grad_norm_squared is nan" in str(results[0])


def test_of_two_clients_neither_is_blamed_and_the_larger_norm_counts_within_a_bound(engine):
    engine.begin_round(make_plan(finish=FinishRule(max_grad_norm=MAX_NORM)))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    contribute(clients[0], 0, 2.0)
    contribute(clients[1], 1, 6.0)
    replies = both(
        [
            lambda: clients[0].finish_step(norm_squared=9.0),
            lambda: clients[1].finish_step(norm_squared=1e20),
        ]
    )
    gradient = (2 * weight_gradient(0) + 6 * weight_gradient(1)) / 8
    # 1e20 counts as 9 · 100², the bound.
    norm = math.sqrt(float(gradient.double().square().sum()) + (2 * 9.0 + 6 * 90_000.0) / 8)
    assert replies[0].grad_norm == pytest.approx(norm, rel=1e-6)


def test_clients_whose_gradients_are_small_or_large_throughout_are_nobodys_fault():
    """Norms apart by 1000, as the clients' gradients of the trunk are."""
    found = norm_faults({0: 1e-6, 1: 1.0, 2: 1e-6, 3: 0.0}, {0: 1e-3, 1: 1.0, 2: 1e-3, 3: 0.0})
    assert found == {}
    assert list(norm_faults({0: 1e-6, 1: 1.0, 2: 1e-6}, {0: 1e-3, 1: 1e-3, 2: 1e-3})) == [1]


def test_gradients_of_other_parameters_are_refused(engine):
    engine.begin_round(make_plan(finish=FinishRule(share_gradients=True)))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    for slot in (0, 1):
        contribute(clients[slot], slot, 2.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(clients[0].finish_step, gradients={"b": torch.ones(2)})
        while not engine.inspect().num_replies >= 5:
            assert not waiting.done()
        with pytest.raises(TrunkRefused, match="differ in b"):
            clients[1].finish_step(gradients={"b": torch.ones(3)})
        clients[1].finish_step(gradients={"b": torch.ones(2)})
        assert torch.equal(waiting.result(timeout=20).gradients["b"], torch.ones(2))


def test_rounds_that_do_not_step_with_every_local_step_have_no_finish_rule(engine):
    with pytest.raises(TrunkRefused, match="every local step"):
        engine.begin_round(make_plan(finish=FinishRule(1.0), step_every=StepEvery.SERVER_ROUND))
