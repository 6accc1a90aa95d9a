"""The pauses of Flower's SuperNode: short while a run goes on, Flower's own before and after."""

import importlib
import time

import pytest

from flower_split.client.launcher import node


class Clock:
    """Moves on by what is slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_pauses_are_short_for_a_minute_after_a_message_and_flowers_own_otherwise() -> None:
    clock = Clock()
    pace = node.Pace(clock.sleep, lambda: clock.now)
    for asked in (3, 3, 0.5, 0.5, 3, 3):  # no message twice, an answer that takes two looks, none
        pace.sleep(asked)
    assert clock.slept == [3, 3, 0.1, 0.1, 0.3, 0.3]
    clock.now += 60.0
    pace.sleep(3)
    assert clock.slept[-1] == 3


def test_loop_of_flowers_supernode_gets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = importlib.import_module("flwr.supernode.start_client_internal")
    monkeypatch.setattr(loop, "time", time)  # put back at the end
    seen: list[object] = []
    monkeypatch.setattr(node, "flower_supernode", lambda: seen.append(vars(loop)["time"]))
    node.main()
    (pace,) = seen
    assert isinstance(pace, node.Pace)
    assert pace.monotonic is time.monotonic
