"""What operators look at: who is waited for and since when, whether the compute thread answers, totals.

Nothing here changes what the engine does. The deadline thread looks about once a second.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flower_split.trunk.engine.phases import Phase

if TYPE_CHECKING:  # a round's index keeps these totals
    from flower_split.trunk.engine.round_state import Round

_FIRST_LINE = 10.0  # seconds of waiting until the log says so; then after twice as long each time


@dataclass(slots=True)
class Totals:
    """Counts since the process started. The engine's lock is held where they change."""

    bytes_received: int = 0
    bytes_sent: int = 0
    rounds_committed: int = 0
    rounds_aborted: int = 0
    checkpoint_seconds: float = 0.0
    compute_seconds: float = 0.0  # of rounds that are over


@dataclass(slots=True)
class _Wait:
    """One slot that the others wait for."""

    since: float
    next_line: float = _FIRST_LINE  # seconds of waiting


@dataclass(slots=True)
class Waits:
    """Since when the open round waits for whom. The engine's lock is held around every method."""

    _of: "Round | None" = None
    _waits: dict[int, _Wait] = field(default_factory=dict)

    def look(self, current: "Round | None", now: float) -> list[tuple[int, str]]:
        """Note who is waited for now; return slots with a line for the log, where one is due.

        Args:
            current: The trunk's round.
            now: On the engine's clock.
        """
        if current is not self._of:
            self._of, self._waits = current, {}
        late = current.waited_for() if current is not None else []
        if current is None or not (late or self._waits):
            return []
        lines = [
            (slot, f"{current}: slot {slot} is back, after {now - wait.since:.0f} s")
            for slot, wait in self._waits.items()
            if slot not in late and wait.next_line > _FIRST_LINE
        ]
        began = current.began if current.windows.phase is Phase.JOINING else now
        self._waits = {slot: self._waits.get(slot) or _Wait(began) for slot in late}
        for slot, wait in self._waits.items():
            waited = now - wait.since
            if waited >= wait.next_line:
                wait.next_line = 2 * waited
                lines.append((slot, f"{current}: waiting for slot {slot} since {waited:.0f} s"))
        return lines

    def seconds(self, slot: int, now: float) -> float:
        """Return how long the others have waited for a slot; 0: they do not."""
        wait = self._waits.get(slot)
        return 0.0 if wait is None else now - wait.since


class Pulse:
    """How long the compute thread lets a call wait: it is asked to do nothing, once a second.

    Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        submit: Asks the compute thread for something.
        clock: Monotonic seconds.
    """

    def __init__(
        self, submit: Callable[[Callable[[], None]], Future[None]], clock: Callable[[], float]
    ) -> None:
        self._submit = submit
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: float | None = None  # None: it has answered
        self._last = 0.0  # seconds

    def beat(self) -> None:
        """Ask, unless the thread has not answered yet."""
        with self._lock:
            if self._asked is not None:
                return
            self._asked = self._clock()
        with contextlib.suppress(RuntimeError):  # the thread has ended: the process is about to
            self._submit(self._answer)

    @property
    def seconds(self) -> float:
        """Return how long a call waits now: as the last one did, or as long as this one has."""
        with self._lock:
            waiting = 0.0 if self._asked is None else self._clock() - self._asked
            return max(self._last if self._asked is None else 0.0, waiting)

    def _answer(self) -> None:
        with self._lock:
            if self._asked is not None:
                self._last, self._asked = self._clock() - self._asked, None
