"""Ctrl-C and SIGTERM while a run is followed: counted, so that every wait can ask for them."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Self

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

_LOOK_SECONDS = 0.1


class Interrupts(AbstractContextManager["Interrupts"]):
    """Collects SIGINT, SIGTERM and SIGHUP while it is open; nothing is raised.

    SIGHUP is left alone where it is ignored (``nohup``). Signals reach handlers in the main thread
    only, so it is opened there.
    """

    def __init__(self) -> None:
        self._count = 0
        self._last = 0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def count(self) -> int:
        """Return how many signals came."""
        return self._count

    @property
    def by_hand(self) -> bool:
        """Return whether the last one was Ctrl-C, so that somebody may press it again."""
        return self._last == signal.SIGINT

    def wait(self, seconds: float, *, above: int = 0) -> bool:
        """Wait until more than ``above`` signals came, ``seconds`` at most; return whether they did.

        It looks every :data:`_LOOK_SECONDS`: a handler may take no lock that a wait holds.
        """
        deadline = time.monotonic() + seconds
        while self._count <= above and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))
        return self._count > above

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._last = number
