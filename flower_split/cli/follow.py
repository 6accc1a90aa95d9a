"""Following a run to its end: its progress, its true outcome, and what Ctrl-C means.

A log stream may end while the run goes on (SQLite answers "database is locked" under load), so only a
terminal status ends this. Ctrl-C and SIGTERM stop the run; a second Ctrl-C leaves it running.
"""

import contextlib
import os
import queue
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flower_split.cli.flwr import Flwr, RunStatus
from flower_split.cli.interrupts import Interrupts
from flower_split.errors import FederationError
from flower_split.runtime.exit_codes import COMPLETED, DETACHED, FAILED, LOST_CONTACT, STOPPED
from flower_split.runtime.logs import MARK

_LINE_SECONDS = 0.2  # between two looks at the log and the signals


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a run's follower waits, in seconds."""

    silence: float = 120.0  # without a log line, until the status is asked
    poll: float = 5.0  # between two questions for the status, once the log has ended
    lost: float = 180.0  # without an answer, until contact counts as lost
    second_press: float = 5.0  # for a second Ctrl-C, before the run is stopped
    stopping: float = 120.0  # for a stopped run to end


class Ended(Protocol):
    """A SuperLink that this command started, or its predecessor did."""

    @property
    def alive(self) -> bool:
        """Return whether its process runs."""

    def describe(self) -> str:
        """Return who it is, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedRun:
    """A run, and how it is reached."""

    run_id: str
    flwr: Flwr
    superlink: Ended | None = None  # None: somebody else's
    directory: Path | None = None  # where it is on this machine; None: not known
    log: Path | None = None  # where every line of the run's log is kept
    patience: Patience = field(default_factory=Patience)

    @property
    def name(self) -> str:
        """Return what ``flower-split attach`` takes."""
        if self.directory is not None and self.superlink is not None:
            return str(self.directory)
        return " ".join([self.run_id, self.flwr.connection]).strip()


class LostContact(FederationError):
    """The SuperLink does not answer any more."""


def follow(run: FollowedRun, interrupts: Interrupts, *, stream: bool) -> int:
    """Show a run's progress until it has ended, and return the exit code.

    Args:
        run: The run.
        interrupts: Open.
        stream: Show every line of the log, not only this package's.
    """
    try:
        seen = interrupts.count
        if seen == 0 and _show_log(run, interrupts, stream):
            status = _wait_for_end(run, interrupts, above=0)
            if status is not None:
                return _tell(run, status)
        return _stop_or_leave(run, interrupts)
    except LostContact as error:
        _say(str(error))
        return LOST_CONTACT if run.superlink is None or run.superlink.alive else FAILED


def stop(run: FollowedRun, interrupts: Interrupts) -> int:
    """Stop a run, wait for its end, and return the exit code."""
    seen = interrupts.count
    try:
        run.flwr.stop(run.run_id)
    except FederationError as error:
        # It may have ended by itself meanwhile, which its status will say.
        _say(str(error))
    status = _wait_for_end(run, interrupts, above=seen, seconds=run.patience.stopping)
    if status is None:
        _say(
            f"run {run.run_id} was told to stop and has not ended yet; this command waits no longer. "
            + _left(run)
        )
        return DETACHED
    return _tell(run, status)


def _show_log(run: FollowedRun, interrupts: Interrupts, stream: bool) -> bool:
    """Show the log until it ends; return False where a signal came first."""
    last = time.monotonic()
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(run.flwr.log(run.run_id))
        kept = stack.enter_context(open(run.log or os.devnull, "w", encoding="utf-8"))
        while not interrupts.count:
            try:
                line = lines.get(timeout=_LINE_SECONDS)
            except queue.Empty:
                if time.monotonic() - last > run.patience.silence:
                    last = time.monotonic()
                    if _has_ended(run):
                        return True
                continue
            if line is None:
                return True
            last = time.monotonic()
            kept.write(line)
            kept.flush()
            _show(line, stream)
    return False


def _show(line: str, stream: bool) -> None:
    if stream:
        print(line, end="", flush=True)
    elif line.startswith(MARK):
        print(line.removeprefix(MARK), end="", flush=True)
    elif line.strip() == MARK.strip():
        print(flush=True)


def _has_ended(run: FollowedRun) -> bool:
    try:
        return run.flwr.status(run.run_id).ended
    except FederationError:
        return run.superlink is not None and not run.superlink.alive


def _wait_for_end(
    run: FollowedRun, interrupts: Interrupts, *, above: int, seconds: float | None = None
) -> RunStatus | None:
    """Ask for the status until the run has ended.

    Args:
        run: The run.
        interrupts: Open; more than ``above`` signals end the wait.
        above: See there.
        seconds: The wait's deadline; None: as long as the run takes and the SuperLink answers.

    Returns:
        The last status; None where a signal came or the time is over.

    Raises:
        LostContact: The SuperLink does not answer for so long, or its process has ended.
    """
    start = answered = time.monotonic()
    told = ""
    while True:
        try:
            status = run.flwr.status(run.run_id)
            answered = time.monotonic()
            if status.ended:
                return status
            if seconds is None and status.status != told:
                told = status.status
                _say(
                    f"the log stream ended, but run {run.run_id} is {told}; waiting for its end. "
                    "Ctrl-C stops it."
                )
        except FederationError as error:
            _check_contact(run, time.monotonic() - answered, error)
        if interrupts.wait(run.patience.poll, above=above):
            return None
        if seconds is not None and time.monotonic() - start > seconds:
            return None


def _check_contact(run: FollowedRun, silent: float, error: FederationError) -> None:
    if run.superlink is not None and not run.superlink.alive:
        raise LostContact(
            f"the SuperLink of run {run.run_id} has ended ({run.superlink.describe()}), and the run "
            f"with it. Go on after its last committed round: flower-split run APP --resume {run.name}"
        ) from error
    if silent > run.patience.lost:
        raise LostContact(
            f"lost contact: no answer about run {run.run_id} for {silent:.0f} s; it may go on. "
            f"{_left(run)} Flower's last answer: {error}"
        ) from error


def _stop_or_leave(run: FollowedRun, interrupts: Interrupts) -> int:
    """Do what a signal asks for: stop the run, or, on a second Ctrl-C, leave it running."""
    seen = interrupts.count
    if interrupts.by_hand:
        _say(
            f"stopping run {run.run_id} in {run.patience.second_press:g} s; press Ctrl-C again to "
            "leave it running."
        )
        if interrupts.wait(run.patience.second_press, above=seen):
            _say(f"run {run.run_id} goes on. {_left(run)}")
            return DETACHED
    _say(f"stopping run {run.run_id}.")
    return stop(run, interrupts)


def _left(run: FollowedRun) -> str:
    """Say what is left running, and how to reach it."""
    process = f"Its SuperLink is {run.superlink.describe()}. " if run.superlink is not None else ""
    return (
        f"{process}Follow it with: flower-split attach {run.name}. End it with: flower-split attach "
        f"{run.name} --stop"
    )


def _tell(run: FollowedRun, status: RunStatus) -> int:
    if status.status == "finished:completed":
        return COMPLETED
    text = " ".join(status.details.split()) or "Flower gave no details; see the log"
    if "flower_split" in text and ("import" in text.lower() or "No module" in text):
        text += " Install flower-split in the Python environment of the SuperLink."
    if run.log is not None:
        text += f" Its whole log is {run.log}."
    _say(f"run {run.run_id} is {status.status}. {text}")
    return STOPPED if status.status == "finished:stopped" else FAILED


def _say(text: str) -> None:
    print(f"flower-split: {text}", file=sys.stderr, flush=True)
