"""A process for each local run, forked from one that has loaded everything, with the run's log."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import TextIO

from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.runtime.exit_codes import COMPLETED, FAILED, STOPPED, WRONG_USE
from flower_split.runtime.logs import MarkedLines

_END_SECONDS = 30.0  # for a run that was told to stop
_LOOK_SECONDS = 2.0  # between two looks whether the parent is there


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where a run's log goes."""

    log: Path  # every line of all its processes
    prefix: str = ""  # of this package's own lines on the terminal
    level: int = logging.INFO  # lowest of the lines on the terminal
    stream: bool = False  # every line goes to the terminal, and none to the log


class _Stopped(BaseException):
    """SIGTERM came."""


class RunProcess:
    """One run in a process of its own. Made by :meth:`start`."""

    def __init__(self, process: ForkProcess) -> None:
        self._process = process

    @classmethod
    def start(cls, work: Callable[[], None], output: Output) -> "RunProcess":
        """Fork a process that does ``work``.

        Call it before this process starts a thread or uses torch.

        Args:
            work: The run; raises what makes it fail.
            output: Where its log goes.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        process = multiprocessing.get_context("fork").Process(target=_run, args=(work, output))
        process.start()
        return cls(process)

    @property
    def exit_code(self) -> int | None:
        """Return how it ended; None while it runs."""
        code = self._process.exitcode
        return FAILED if code is not None and code < 0 else code

    def wait(self, seconds: float) -> bool:
        """Wait for its end, ``seconds`` at most; return whether it has ended."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def stop(self) -> None:
        """Have it close what it opened and end; by force where it does not in time."""
        deadline = time.monotonic() + _END_SECONDS
        while not self.wait(1.0) and time.monotonic() < deadline:
            self._process.terminate()
        if not self.wait(0.0):
            self._process.kill()
            self._process.join()


def _run(work: Callable[[], None], output: Output) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides what Ctrl-C means
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminal = _redirect(output)
    try:
        sys.exit(_code_of(work, output, terminal))
    finally:
        logging.shutdown()


def _code_of(work: Callable[[], None], output: Output, terminal: TextIO) -> int:
    try:
        _end_with(os.getppid())
        work()
    except _Stopped:
        return STOPPED
    except FlowerSplitError as error:
        print(f"flower-split: {error}{_log_of(output)}", file=terminal, flush=True)
        return WRONG_USE if isinstance(error, ConfigError) else FAILED
    except Exception as error:
        # The edge of a process: the log has the traceback, the terminal one line.
        logging.getLogger(__name__).exception("an unexpected error")
        text = f"flower-split: an unexpected {type(error).__name__}: {error}"
        print(f"{text}{_log_of(output)}", file=terminal, flush=True)
        return FAILED
    return COMPLETED


def _log_of(output: Output) -> str:
    return "" if output.stream else f" The whole log is {output.log}."


def _end_with(parent: int) -> None:
    """Stop this process once its parent has ended, however that ended.

    A timer, not a thread: this process is yet to fork.
    """

    def look(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            _stop(number, frame)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # closing takes a while; once is enough
    raise _Stopped


def _redirect(output: Output) -> TextIO:
    """Send everything to the log, and this package's own lines to the terminal as well.

    Returns:
        The terminal.
    """
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    logger = logging.getLogger("flower_split")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    kept = logging.StreamHandler(sys.stderr)
    kept.setFormatter(MarkedLines())
    logger.addHandler(kept)
    if output.stream:
        return terminal
    log = os.open(output.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    shown = logging.StreamHandler(terminal)
    shown.setFormatter(_Plain(output.prefix))
    shown.setLevel(output.level)
    logger.addHandler(shown)
    return terminal


class _Plain(logging.Formatter):
    """Lines for people: no mark; the level from WARNING on."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        return "\n".join((self._prefix + line).rstrip() for line in text.split("\n"))
