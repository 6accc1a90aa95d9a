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


def test_pauses_are_a_share_of_the_time_since_the_last_message_up_to_flowers_own() -> None:
    clock = Clock()
    pace = node.Pace(clock.sleep, lambda: clock.now)
    pace.sleep(3)
    clock.now += 100.0
    for asked in (3, 0.5, 0.5, 3):  # long no message, an answer that takes two looks, none again
        pace.sleep(asked)
    assert clock.slept == [0.05, 3, 0.1, 0.1, pytest.approx(0.05)]
    for passed in (10.0, 60.0):
        clock.now += passed
        pace.sleep(3)
    assert clock.slept[-2:] == [pytest.approx(0.05 * 10.15, rel=1e-3), 3]


def test_a_minute_without_a_message_takes_about_a_hundred_questions() -> None:
    clock = Clock()
    pace = node.Pace(clock.sleep, lambda: clock.now)
    pace.sleep(0.5)
    while clock.now < 1060.0:
        pace.sleep(3)
    assert len(clock.slept) < 110 and clock.slept[-1] == pytest.approx(3, abs=0.2)


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
