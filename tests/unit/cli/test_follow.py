"""Following a run: only a terminal status ends it, and every other end is said."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flower_split.cli.flwr import Flwr, RunStatus
from flower_split.cli.follow import FollowedRun, Patience, follow, stop
from flower_split.cli.interrupts import Interrupts
from flower_split.errors import FederationError
from flower_split.runtime.exit_codes import COMPLETED, DETACHED, FAILED, LOST_CONTACT, STOPPED

COMPLETE = RunStatus(status="finished:completed", details="")
RUNNING = RunStatus(status="running", details="")
NO_PATIENCE = Patience(silence=0.2, poll=0.0, lost=0.0, second_press=0.0, stopping=0.0)


@dataclass(frozen=True)
class FakeFlwr(Flwr):
    """A SuperLink that gives these statuses one after the other; the last one stays."""

    answers: Sequence[RunStatus | None] = (COMPLETE,)  # None: no answer
    lines: Sequence[str | None] = (None,)
    asked: list[str] = field(default_factory=list)
    press: Sequence[int] = ()  # presses Ctrl-C while it answers these questions
    interrupts: "Pressed | None" = None

    def status(self, run_id: str) -> RunStatus:
        number = sum(word == "status" for word in self.asked)
        self.asked.append("status")
        if number in self.press and self.interrupts is not None:
            self.interrupts.press()
        answer = self.answers[min(number, len(self.answers) - 1)]
        if answer is None:
            raise FederationError("connection refused")
        return answer

    def stop(self, run_id: str) -> None:
        self.asked.append("stop")

    @contextmanager
    def log(self, run_id: str) -> Iterator["queue.Queue[str | None]"]:
        lines: queue.Queue[str | None] = queue.Queue()
        for line in self.lines:
            lines.put(line)
        yield lines


class Pressed(Interrupts):
    """Signals that a test presses."""

    def __init__(self, by_hand: bool = True) -> None:
        super().__init__()
        self.pressed = 0
        self._hand = by_hand

    def press(self) -> None:
        self.pressed += 1

    @property
    def count(self) -> int:
        return self.pressed

    @property
    def by_hand(self) -> bool:
        return self._hand

    def wait(self, seconds: float, *, above: int = 0) -> bool:
        return self.pressed > above


@dataclass
class Process:
    """A SuperLink's process."""

    alive: bool = True

    def describe(self) -> str:
        return "process 17 on 127.0.0.1:1"


def run_of(flwr: FakeFlwr, superlink: Process | None = None) -> FollowedRun:
    where = Path("/runs/x") if superlink else None
    return FollowedRun(
        run_id="5", flwr=flwr, superlink=superlink, directory=where, patience=NO_PATIENCE
    )


def test_a_log_that_ends_early_is_said_and_the_run_is_polled_to_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flwr = FakeFlwr(answers=[RUNNING, RUNNING, COMPLETE], lines=["flower-split  round 1\n", None])
    assert follow(run_of(flwr), Pressed(), stream=False) == COMPLETED
    shown = capsys.readouterr()
    assert flwr.asked == ["status"] * 3
    assert shown.out == "round 1\n"
    assert shown.err.count("the log stream ended, but run 5 is running") == 1


def test_a_log_that_falls_silent_does_not_hide_that_the_run_has_ended() -> None:
    assert follow(run_of(FakeFlwr(lines=[])), Pressed(), stream=False) == COMPLETED


@pytest.mark.parametrize(
    ("status", "code"),
    [("finished:completed", COMPLETED), ("finished:failed", FAILED), ("finished:stopped", STOPPED)],
)
def test_the_exit_code_is_the_runs_true_outcome(
    status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flwr = FakeFlwr(answers=[RunStatus(status=status, details="why")])
    assert follow(run_of(flwr), Pressed(), stream=False) == code
    assert (f"run 5 is {status}. why" in capsys.readouterr().err) == (code != COMPLETED)


def test_a_superlink_that_answers_no_more_is_lost_contact_and_says_what_may_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flwr = FakeFlwr(connection="far", answers=[RUNNING, None])
    assert follow(run_of(flwr), Pressed(), stream=False) == LOST_CONTACT
    said = capsys.readouterr().err
    assert "lost contact" in said and "flower-split attach 5 far" in said
    assert "connection refused" in said


def test_one_answer_that_fails_is_not_lost_contact() -> None:
    patient = Patience(silence=0.2, poll=0.0, lost=60.0, second_press=0.0, stopping=0.0)
    flwr = FakeFlwr(answers=[RUNNING, None, None, COMPLETE])
    run = FollowedRun(run_id="5", flwr=flwr, patience=patient)
    assert follow(run, Pressed(), stream=False) == COMPLETED


def test_a_local_superlink_that_died_ends_the_run_and_names_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flwr, process = FakeFlwr(answers=[None]), Process(alive=False)
    assert follow(run_of(flwr, process), Pressed(), stream=False) == FAILED
    said = capsys.readouterr().err
    assert "process 17" in said and "--resume /runs/x" in said


def test_ctrl_c_stops_the_run_and_waits_for_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    pressed = Pressed()
    pressed.press()
    flwr = FakeFlwr(answers=[RunStatus(status="finished:stopped", details="")])
    assert follow(run_of(flwr), pressed, stream=False) == STOPPED
    assert flwr.asked == ["stop", "status"]
    assert "press Ctrl-C again to leave it running" in capsys.readouterr().err


def test_a_second_ctrl_c_leaves_the_run_and_says_how_to_reach_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Twice(Pressed):
        def wait(self, seconds: float, *, above: int = 0) -> bool:
            self.press()
            return super().wait(seconds, above=above)

    pressed = Twice()
    pressed.press()
    flwr = FakeFlwr()
    assert follow(run_of(flwr, Process()), pressed, stream=False) == DETACHED
    assert flwr.asked == []
    said = capsys.readouterr().err
    assert "run 5 goes on" in said and "process 17" in said
    assert "flower-split attach /runs/x --stop" in said


def test_sigterm_stops_at_once_without_an_offer(capsys: pytest.CaptureFixture[str]) -> None:
    pressed = Pressed(by_hand=False)
    pressed.press()
    flwr = FakeFlwr(answers=[RunStatus(status="finished:stopped", details="")])
    assert follow(run_of(flwr), pressed, stream=False) == STOPPED
    assert "again" not in capsys.readouterr().err


def test_ctrl_c_while_the_status_is_polled_stops_too() -> None:
    pressed = Pressed()
    stopped = RunStatus(status="finished:stopped", details="")
    flwr = FakeFlwr(answers=[RUNNING, stopped], press=[0], interrupts=pressed)
    assert follow(run_of(flwr), pressed, stream=False) == STOPPED
    assert flwr.asked == ["status", "stop", "status"]


def test_a_run_that_does_not_stop_in_time_is_said_to_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stop(run_of(FakeFlwr(answers=[RUNNING]), Process()), Pressed()) == DETACHED
    assert "has not ended yet" in capsys.readouterr().err


def test_a_run_that_ended_before_it_was_stopped_has_its_own_outcome() -> None:
    class Late(FakeFlwr):
        def stop(self, run_id: str) -> None:
            raise FederationError("run 5 has ended")

    assert stop(run_of(Late()), Pressed()) == COMPLETED


def test_the_whole_log_is_kept_and_named_when_the_run_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = RunStatus(status="finished:failed", details="why")
    flwr = FakeFlwr(answers=[failed], lines=["of Flower\n", "flower-split  ours\n", None])
    run = FollowedRun(run_id="5", flwr=flwr, log=tmp_path / "run.log", patience=NO_PATIENCE)
    assert follow(run, Pressed(), stream=False) == FAILED
    assert (tmp_path / "run.log").read_text() == "of Flower\nflower-split  ours\n"
    shown = capsys.readouterr()
    assert shown.out == "ours\n" and f"Its whole log is {tmp_path / 'run.log'}" in shown.err
