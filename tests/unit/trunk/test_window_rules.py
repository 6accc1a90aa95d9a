"""A window rule gives rounds up that the quorum would let go on, and nothing else."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flower_split.errors import ConfigError, RoundAborted
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.window_rules import (
    QuorumAlone,
    WindowMember,
    WindowRule,
    make_window_rule,
)
from tests.support.distributions import installed
from tests.support.toy_trunk import HIDDEN, ToyClient, make_engine, make_plan


class Recorded(WindowRule):
    """Gives up where ``needed`` is missing, and notes what it was asked."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.asked: list[tuple[int, list[WindowMember]]] = []

    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        self.asked.append((window, list(members)))
        gone = [member.slot for member in members if member.problem]
        return f"slot {self.needed} has the rare labels." if self.needed in gone else ""


class Broken(WindowRule):
    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        raise ZeroDivisionError("by zero")


def after_slot_1_has_left(rule: WindowRule | None) -> TrunkEngine:
    """Three clients of two steps, quorum one half; the first step is done when slot 1 leaves."""
    engine = make_engine(window_rule=rule)
    engine.begin_round(make_plan((0, 1, 2), quorum=0.5))
    clients = [ToyClient(engine, slot, 2) for slot in range(3)]
    for client in clients:
        client.forward(torch.ones(1, 2, HIDDEN))
        client.backward(torch.ones(1, 2, HIDDEN), num_tokens=2.0)
    grant = clients[0].grant
    engine.wait_version(grant.session, grant.epoch, 1, time.monotonic() + 10)
    clients[1].close()
    return engine


def test_a_window_goes_on_where_quorum_and_rule_allow_it() -> None:
    rule = Recorded(needed=0)
    engine = after_slot_1_has_left(rule)
    status = engine.status()
    assert (status.phase, status.window) == ("open", 1)
    [(window, members)] = rule.asked  # asked once: when somebody left, not when nobody had
    assert window == 1
    assert [member.slot for member in members] == [0, 1, 2]
    assert [bool(member.problem) for member in members] == [False, True, False]
    assert [(m.planned_steps, m.steps_done, m.num_tokens) for m in members] == [(2, 1, 2.0)] * 3
    engine.close()


def test_a_rule_gives_the_round_up_and_says_why_and_who() -> None:
    engine = after_slot_1_has_left(Recorded(needed=1))
    status = engine.status()
    assert status.phase == "aborted" and status.version == 0
    assert status.problem.startswith("window 1 does not go on without slot 1: ")
    assert "slot 1 has the rare labels (trunk.window-rule, Recorded)" in status.problem
    with pytest.raises(RoundAborted, match="rare labels"):
        engine.prepare_round("test", 1, 0, time.monotonic() + 5)
    engine.close()


def test_a_rule_that_raises_gives_the_round_up_and_the_trunk_lives() -> None:
    engine = after_slot_1_has_left(Broken())
    assert "it failed with ZeroDivisionError: by zero" in engine.status().problem
    engine.begin_round(make_plan((0,), attempt=1))
    client = ToyClient(engine, 0)
    client.forward(torch.ones(1, 2, HIDDEN))
    client.backward(torch.ones(1, 2, HIDDEN))
    assert engine.prepare_round("test", 1, 1, time.monotonic() + 5).optimizer_steps == 1
    engine.close()


def test_no_rule_is_asked_where_the_quorum_is_broken() -> None:
    rule = Recorded(needed=0)
    engine = make_engine(window_rule=rule)
    engine.begin_round(make_plan((0, 1), quorum=1.0))
    clients = [ToyClient(engine, slot) for slot in (0, 1)]
    clients[1].close()
    assert "needs 2 of its 2" in engine.status().problem and rule.asked == []
    engine.close()


def test_no_rule_is_asked_of_an_evaluation() -> None:
    rule = Recorded(needed=1)
    engine = make_engine(window_rule=rule)
    engine.begin_round(make_plan((0, 1), quorum=0.5, evaluate=True))
    clients = [ToyClient(engine, slot, evaluate=True) for slot in (0, 1)]
    clients[1].close()
    assert engine.status().phase != "aborted" and rule.asked == []
    engine.close()


def test_rules_are_made_by_name_and_by_import_path(tmp_path: Path) -> None:
    assert isinstance(make_window_rule("quorum"), QuorumAlone)
    source = (
        "from flower_split.trunk.engine.window_rules import WindowRule\n"
        "class Mine(WindowRule):\n"
        "    def refusal(self, window, members):\n"
        "        return ''\n"
        "class Half(WindowRule):\n"
        "    pass\n"
        "other = 3\n"
    )
    (tmp_path / "my_windows.py").write_text(source)
    with installed(tmp_path):
        assert type(make_window_rule("my_windows:Mine")).__name__ == "Mine"
        with pytest.raises(ConfigError, match="trunk.window-rule 'my_windows:Half' cannot be made"):
            make_window_rule("my_windows:Half")
        with pytest.raises(ConfigError, match="must be a subclass of .*WindowRule; it is 3"):
            make_window_rule("my_windows:other")
        with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
            make_window_rule("no_such_module:Mine")
