"""What one client may take of a round, counted by hand."""

import time
from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import ForwardMode
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan

INPUT = torch.ones(1, 4, HIDDEN)


def evaluations(client: ToyClient, count: int) -> int:
    """How many of ``count`` evaluations were answered; the others must name the key."""
    answered = 0
    for _ in range(count):
        try:
            client.forward(INPUT, mode=ForwardMode.EVALUATE)
            answered += 1
        except TrunkRefused as error:
            assert error.reason is RefusalReason.OVER_BUDGET
            assert "trunk.max-evaluations" in str(error)
    return answered


def computed(engine: TrunkEngine) -> list[int]:
    """A list that grows with every forward that the trunk's model computes."""
    calls: list[int] = []
    engine.compute.trunk.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("step_every", [StepEvery.LOCAL_STEP, StepEvery.SERVER_ROUND])
@pytest.mark.parametrize("allowed", [0, 2])
def test_training_round_takes_as_many_evaluations_as_the_key_says(
    step_every: StepEvery, allowed: int
) -> None:
    with closing(make_engine(shares=Shares(evaluations=allowed))) as engine:
        engine.begin_round(make_plan((0, 1), step_every=step_every))
        clients = [ToyClient(engine, slot) for slot in (0, 1)]
        calls = computed(engine)
        assert evaluations(clients[0], 5) == allowed
        assert len(calls) == allowed  # the others were refused before anything was computed
        assert evaluations(clients[1], 5) == allowed  # a share of its own
        for client in clients:
            client.forward(INPUT)
            client.backward(INPUT)
        report = engine.prepare_round("test", 1, 0, time.monotonic() + 5)
        assert report.optimizer_steps == 1 and all(slot.completed for slot in report.slots)


def test_evaluation_round_takes_any_number_of_evaluations() -> None:
    with closing(make_engine()) as engine:
        engine.begin_round(make_plan((0,), evaluate=True))
        assert evaluations(ToyClient(engine, 0, 0, evaluate=True), 5) == 5
        engine.commit_round("test", 1, 0)
        engine.begin_round(make_plan((0,), server_round=2))  # and the next one trains
        assert evaluations(ToyClient(engine, 0), 1) == 0


def sent(call: Callable[..., object], *args: object, **options: object) -> bool:
    """Whether a call is answered; refused, it must name the key."""
    try:
        call(INPUT, *args, **options)
    except TrunkRefused as error:
        assert error.reason is RefusalReason.OVER_BUDGET
        assert "trunk.held-memory-per-client" in str(error)
        return False
    return True


def test_replies_that_are_not_acknowledged_are_within_the_share() -> None:
    """Room for five replies of 48 bytes: two micro-batches have four, the third one forward."""
    shares = Shares(held_bytes=5 * INPUT.nbytes)
    with closing(make_engine(shares=shares)) as engine:
        engine.begin_round(make_plan((0, 1), step_every=StepEvery.SERVER_ROUND))
        greedy, honest = (ToyClient(engine, slot) for slot in (0, 1))
        for index in range(2):
            assert sent(greedy.forward, 0, index, digest=bytes([index]))
            assert sent(greedy.backward, 0, index, last=False, digest=bytes([index]))
        assert sent(greedy.forward, 0, 2)
        assert not sent(greedy.backward, 0, 2, last=False)
        assert not sent(greedy.forward, 0, 3)
        assert sent(greedy.forward, 0, 2)  # a repetition gets the reply that is kept
        assert sent(greedy.forward, 0, 3, acknowledged=2)
        assert sent(greedy.backward, 0, 2, last=False)
        for call in (honest.forward, honest.backward):
            assert sent(call)


def test_early_gradients_are_within_the_share_but_not_the_one_that_they_wait_for() -> None:
    """Micro-batches 3, 2, 1: six replies of 48 bytes beside two gradients of 36 have 360."""
    shares = Shares(held_bytes=6 * INPUT.nbytes + 2 * HIDDEN * HIDDEN * 4 - 1)
    with closing(make_engine(shares=shares)) as engine:
        engine.begin_round(make_plan((0,), step_every=StepEvery.SERVER_ROUND))
        client = ToyClient(engine, 0)
        for index in (3, 2):
            assert sent(client.forward, 0, index)
            assert sent(client.backward, 0, index, last=index == 3)
        assert sent(client.forward, 0, 1)
        assert not sent(client.backward, 0, 1, last=False)
        assert sent(client.forward, 0, 0)
        assert sent(client.backward, 0, 0, last=False)
        report = engine.status().slots[0]
        assert report.contributions == 3 and not report.completed


def test_calls_compute_for_as_long_as_the_key_says() -> None:
    ahead = [0.0]  # of the true clock

    def slowly(*_: object) -> None:
        ahead[0] += 1.0

    shares = Shares(compute_seconds=1.5)
    clock = lambda: time.monotonic() + ahead[0]  # noqa: E731
    with closing(make_engine(shares=shares, clock=clock)) as engine:
        engine.begin_round(make_plan((0, 1), step_every=StepEvery.SERVER_ROUND))
        greedy, honest = (ToyClient(engine, slot) for slot in (0, 1))
        engine.compute.trunk.register_forward_pre_hook(slowly)
        for index in range(2):
            greedy.forward(INPUT, 0, index)
        for _ in range(2):  # and nothing of the refused call is left
            with pytest.raises(TrunkRefused, match=r"for 1.5 s.*trunk.max-compute-seconds") as over:
                greedy.forward(INPUT, 0, 2)
            assert over.value.reason is RefusalReason.OVER_BUDGET
        with pytest.raises(TrunkRefused, match="trunk.max-compute-seconds"):
            greedy.forward(INPUT, 0, 3, mode=ForwardMode.NO_GRAD)
        assert ahead == [2.0]
        greedy.forward(INPUT, 0, 1)  # a repetition computes nothing
        honest.forward(INPUT)
        assert ahead == [3.0]
