"""The pauses of Flower's SuperNode: short while a run goes on, Flower's own before and after."""

import importlib
import time

import pytest

from flower_split.client.launcher import node
from flower_split.errors import ConfigError


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


LOOP = "flwr.supernode.start_client_internal"


def test_loop_of_flowers_supernode_gets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = importlib.import_module(LOOP)
    monkeypatch.setattr(loop, "time", time)  # put back at the end
    assert node.exchange_clock(LOOP)
    pace = vars(loop)["time"]
    assert isinstance(pace, node.Pace) and pace.monotonic is time.monotonic
    assert not node.exchange_clock(LOOP) and vars(loop)["time"] is pace


@pytest.mark.parametrize("module", ["flwr.no_such_module", "json"])
def test_release_of_flower_without_that_loop_is_left_as_it_is(module: str) -> None:
    assert not node.exchange_clock(module)


def test_flowers_command_is_that_of_its_console_script(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode.cli.flower_supernode import flower_supernode

    assert node.flowers_command() is flower_supernode
    monkeypatch.setattr(node, "entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match="flower-supernode is not there. Install Flower"):
        node.flowers_command()
