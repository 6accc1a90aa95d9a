"""What one client may take of a round, counted by hand."""

import time
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
