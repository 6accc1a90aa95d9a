"""How fast calls are refused: a flood of them waits, without a worker, and takes little of the trunk.

A refusal costs as much of the interpreter as a small call. Each caller's (and all strangers' together) are
therefore answered at a rate: some at once, then so many a second. One that waits holds its stream, of which
a connection has a few, so a caller that asks faster waits for its own answers. No worker waits with it: the
calls to be refused are kept in a heap, and one thread answers them when they are due.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from flower_split.runtime.closing import Closing

_MAX_WAITING = 4096  # calls that wait to be refused; one more is refused at once
_MAX_CALLERS = 4096  # that are remembered, but for those whose refusals wait

Given = ParamSpec("Given")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one caller's refusals."""

    burst: int  # at once
    per_second: float  # after them


STRANGERS = Rate(burst=256, per_second=200.0)  # all of them together
PARTICIPANT = Rate(burst=64, per_second=50.0)


class Pace(Closing):
    """Says when a refusal is due, and answers then. Thread-safe: a lock of its own, taken last.

    Args:
        clock: Monotonic seconds; tests pass their own.
        participant: Rate of each participant.

    Attributes:
        spent: Until when the rate of each caller is taken that was refused lately. Read without the
            lock.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, participant: Rate = PARTICIPANT
    ) -> None:
        self._participant = participant
        self._clock = clock
        self._changed = threading.Condition()
        self.spent: dict[str, float] = {}
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []  # a heap, by time
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def is_over(self, caller: str) -> bool:
        """Return whether a caller's refusals have to wait now."""
        until, rate = self.spent.get(caller), self._rate_of(caller)
        return until is not None and until - self._clock() > rate.burst / rate.per_second

    def count(self, caller: str) -> float:
        """Count a refusal; return when it is due."""
        rate = self._rate_of(caller)
        with self._changed:
            now = self._clock()
            if len(self.spent) > _MAX_CALLERS:
                self.spent = {name: until for name, until in self.spent.items() if until > now}
            until = max(now, self.spent.get(caller, now)) + 1.0 / rate.per_second
            if len(self._waiting) >= _MAX_WAITING:
                return now
            self.spent[caller] = until
            return max(now, until - rate.burst / rate.per_second)

    def lane(self, caller: str) -> "Lane":
        """Return where the refusals of a caller run; empty: of strangers."""
        return Lane(self, caller)

    def _rate_of(self, caller: str) -> Rate:
        return self._participant if caller else STRANGERS

    def run_at(self, due: float, run: Callable[[], None]) -> None:
        """Have the one thread run something, which must not wait."""
        with self._changed:
            heapq.heappush(self._waiting, (due, next(self._numbers), run))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="trunk-refusals", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting or self._waiting[0][0] > self._clock():
                    if self._closed:
                        break
                    left = self._waiting[0][0] - self._clock() if self._waiting else None
                    self._changed.wait(left)
                if not self._waiting:
                    return  # closed
                run = heapq.heappop(self._waiting)[2]
            run()


class Lane(ThreadPoolExecutor):
    """A thread pool in gRPC's eyes: what it submits runs when its caller's refusal is due.

    gRPC lets the behaviour of a call name its pool (``experimental_thread_pool``), which must be one of
    this class. No thread of its own is ever started.

    Args:
        pace: The pace whose thread answers.
        caller: The caller that is refused.
    """

    def __init__(self, pace: Pace, caller: str) -> None:
        super().__init__(1)
        self._pace = pace
        self._caller = caller

    def submit(
        self, fn: Callable[Given, Value], /, *args: Given.args, **kwargs: Given.kwargs
    ) -> Future[Value]:
        """Run ``fn`` when the caller's next refusal is due."""
        future: Future[Value] = Future()
        run = partial(_fulfil, future, partial(fn, *args, **kwargs))
        self._pace.run_at(self._pace.count(self._caller), run)
        return future


def _fulfil(future: Future[Value], run: Callable[[], Value]) -> None:
    try:
        future.set_result(run())
    except BaseException as error:  # gRPC's own, which looks at the future
        future.set_exception(error)
