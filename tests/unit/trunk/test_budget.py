"""The activation cache's budgets, and the replies that a client acknowledges."""

import threading
import time
import weakref

import pytest
import torch

from flower_split.config import OptimizerConfig
from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.compute.compute import TrunkCompute
from tests.support.loopback import TinyTrunk
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan

INPUT = torch.ones(2, 4, HIDDEN)


def flood(client: ToyClient, count: int, start: int = 0) -> int:
    """Forwards that never come back; returns how many were refused."""
    refused = 0
    for index in range(start, start + count):
        try:
            client.forward(INPUT, 0, index, digest=str(index).encode())
        except TrunkRefused as error:
            assert error.reason is RefusalReason.OVER_BUDGET
            refused += 1
    return refused


def test_flood_stays_in_its_own_budget_and_the_honest_client_never_notices():
    budget = 20 * INPUT.nbytes
    engine = make_engine(activation_bytes=budget, activation_bytes_per_client=4 * INPUT.nbytes)
    engine.begin_round(make_plan())
    flooding, honest = (ToyClient(engine, slot) for slot in (0, 1))
    assert flood(flooding, 50) > 40
    status = engine.status().activations
    assert status.num_bytes <= 4 * INPUT.nbytes
    assert (status.refusals, status.budget_bytes) == (50 - status.num_bytes // INPUT.nbytes, budget)
    honest.forward(INPUT)
    honest.backward(INPUT)
    engine.close()


@pytest.mark.parametrize("step_every", [StepEvery.LOCAL_STEP, StepEvery.SERVER_ROUND])
def test_flood_without_limits_of_its_own_leaves_the_others_their_share(step_every):
    engine = make_engine(activation_bytes=20 * INPUT.nbytes)
    engine.begin_round(make_plan((0, 1), step_every=step_every))
    flooding, honest = (ToyClient(engine, slot) for slot in (0, 1))
    assert flood(flooding, 50) >= 40
    assert engine.status().activations.num_bytes <= 10 * INPUT.nbytes
    honest.forward(INPUT)
    honest.backward(INPUT)
    engine.close()


def test_forward_over_the_budget_is_refused_before_it_is_computed():
    engine = make_engine(activation_bytes=INPUT.nbytes)
    engine.begin_round(make_plan((0,)))
    client = ToyClient(engine, 0)
    client.forward(INPUT, 0, 0)
    calls = []
    engine.compute.forward_train = lambda *args, **kwargs: calls.append(args)
    with pytest.raises(TrunkRefused, match="slot 0 keeps|the trunk keeps"):
        client.forward(INPUT, 0, 1, digest=b"1")
    assert not calls
    engine.close()


def test_forwards_of_a_window_that_is_over_are_freed():
    engine = make_engine()
    engine.begin_round(make_plan())
    first, second = (ToyClient(engine, slot, 2) for slot in (0, 1))
    first.forward(INPUT, 0, 0)
    first.backward(INPUT, 0, 0)
    first.forward(INPUT, 0, 1, digest=b"after its last one")
    assert engine.status().activations.num_bytes > 0
    second.forward(INPUT)
    second.backward(INPUT)
    engine.wait_version(first.grant.session, first.grant.epoch, 1, time.monotonic() + 10)
    assert engine.status().activations.num_bytes == 0
    engine.close()


def test_report_of_a_round_tells_peak_recomputes_and_refusals():
    engine = make_engine(activation_bytes=3 * INPUT.nbytes, dropout=0.5)  # a graph takes two
    engine.begin_round(make_plan((0,), step_every=StepEvery.SERVER_ROUND))
    client = ToyClient(engine, 0)
    assert flood(client, 3) == 1
    for index in range(2):
        client.backward(INPUT, 0, index, last=index == 1, digest=str(index).encode())
    activations = engine.prepare_round("test", 1, 0, time.monotonic() + 5).activations
    assert activations.num_bytes == 0
    assert 0 < activations.peak_bytes <= 3 * INPUT.nbytes
    assert (activations.recomputes, activations.refusals) == (1, 1)
    engine.close()


def rate_of_honest(seconds: float, *, with_flood: bool) -> float:
    """Micro-batches per second of one client, beside another that floods or one that is idle."""
    engine = make_engine(activation_bytes=8 * INPUT.nbytes)
    engine.begin_round(make_plan((0, 1), step_every=StepEvery.SERVER_ROUND))
    flooding, honest = (ToyClient(engine, slot) for slot in (0, 1))
    stop = threading.Event()

    def run() -> None:
        start = 0
        while not stop.wait(0.002):  # as often as a network lets it
            flood(flooding, 1, start)
            start += 1

    thread = threading.Thread(target=run)
    if with_flood:
        thread.start()
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        digest = str(done).encode()
        honest.forward(INPUT, 0, done, digest=digest)
        honest.backward(INPUT, 0, done, last=False, digest=digest)
        done += 1
    stop.set()
    if with_flood:
        thread.join()
        assert engine.status().activations.refusals > 0
        assert engine.status().activations.peak_bytes <= 8 * INPUT.nbytes
    engine.close()
    return done / seconds


@pytest.mark.slow
def test_honest_client_keeps_its_rate_beside_a_flood():
    ratios = []
    for _ in range(3):
        alone = rate_of_honest(4.0, with_flood=False)
        ratios.append(rate_of_honest(4.0, with_flood=True) / alone)
    assert sorted(ratios)[1] >= 0.8


def test_acknowledged_replies_of_a_long_window_are_released():
    engine = make_engine()
    engine.begin_round(make_plan((0,), step_every=StepEvery.SERVER_ROUND))
    client = ToyClient(engine, 0)
    for index in range(50):
        digest = str(index).encode()
        client.forward(INPUT, 0, index, digest=digest, acknowledged=index)
        client.backward(INPUT, 0, index, last=index == 49, digest=digest)
        assert engine.inspect().num_replies <= 2
    engine.close()


def test_acknowledged_call_that_comes_again_is_refused_and_counts_once():
    engine = make_engine()
    engine.begin_round(make_plan((0,), step_every=StepEvery.SERVER_ROUND))
    client = ToyClient(engine, 0)
    client.forward(INPUT, 0, 0)
    client.backward(INPUT, 0, 0, last=False)
    client.forward(INPUT, 0, 1, digest=b"1", acknowledged=1)
    with pytest.raises(TrunkRefused, match="acknowledged") as info:
        client.backward(INPUT, 0, 0, last=False)
    assert info.value.reason is RefusalReason.STALE_VERSION
    assert engine.status().slots[0].contributions == 1
    engine.close()


def test_session_opened_again_gets_the_stored_replies():
    """A client that was started again within the first window goes on where it was."""
    engine = make_engine()
    engine.begin_round(make_plan((0,)))
    first = ToyClient(engine, 0)
    output = first.forward(INPUT)
    again = ToyClient(engine, 0)
    assert again.grant == first.grant
    assert again.forward(INPUT) is output
    again.backward(INPUT)
    assert engine.status().slots[0].contributions == 1
    engine.close()


class Clock:
    """Seconds that pass only when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("step_every", [StepEvery.SERVER_ROUND, StepEvery.CONTRIBUTION])
def test_lease_of_a_silent_client_ends_and_the_others_go_on(step_every):
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.begin_round(make_plan((0, 1, 2), step_every=step_every, quorum=0.5, window_seconds=30.0))
    silent, busy = (ToyClient(engine, slot, 2) for slot in (0, 1))
    if step_every is StepEvery.SERVER_ROUND:
        silent.forward(INPUT, timeout=1e9)
    for index in range(3):
        clock.now += 20.0
        digest = str(index).encode()
        version = busy.forward(INPUT, 0, index, digest=digest, timeout=1e9).version
        busy.backward(INPUT, 0, index, last=False, version=version, digest=digest)
    engine.expire()
    slots = {slot.slot: slot for slot in engine.status().slots}
    assert slots[0].problem == "it was silent for 30 s, so its lease ended"
    assert not slots[1].problem  # it has called all along
    assert not slots[2].problem  # it has yet to begin: participants may run one after the other
    assert engine.status().activations.num_bytes == 0
    with pytest.raises(TrunkRefused) as info:
        silent.forward(INPUT, 0, 1, digest=b"late", timeout=1e9)
    assert info.value.reason is RefusalReason.DROPPED
    engine.close()


def test_a_forward_that_no_backward_follows_is_freed_with_its_activation() -> None:
    trunk = TinyTrunk()
    compute = TrunkCompute(trunk, OptimizerConfig(name="sgd"), seed=0)
    hidden = torch.ones(1, 2, trunk.one.in_features)
    _, activation = compute.forward_train({"hidden_states": hidden}, seed_of="a")
    left = weakref.ref(activation.hidden)
    del hidden, activation
    assert left() is None
