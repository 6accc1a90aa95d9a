"""Nothing waits for ever: a thread that ends windows at their deadlines, and leases of the silent."""

import threading
from collections.abc import Callable
from functools import partial

from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.round_lifecycle import RoundKeeper


class Watchdog:
    """Wakes at the open window's deadline and lets the compute thread expire it.

    Args:
        keeper: Of the open round.
        worker: The compute thread.
        changed: The engine's lock, notified at every change.
        clock: Monotonic seconds.
        free_caches: Frees key-value caches that nobody uses any more; called once a second.
    """

    def __init__(
        self,
        keeper: RoundKeeper,
        worker: ComputeThread,
        changed: threading.Condition,
        clock: Callable[[], float],
        free_caches: Callable[[], object],
    ) -> None:
        self._keeper = keeper
        self._worker = worker
        self._changed = changed
        self._clock = clock
        self._free_caches = free_caches
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="trunk-deadlines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                current = self._keeper.round
                deadline = (
                    current.windows.deadline if current and not current.over else float("inf")
                )
                left = deadline - self._clock()
                silent = bool(current and self._keeper.silent(current))
                silent = silent or bool(self._keeper.flights.silent())
                if left > 0 and not silent:
                    self._changed.wait(min(left, 1.0))
            if left > 0 and not silent:
                if not self._closed:
                    self._free_caches()
            elif current is not None:
                self._worker.do(partial(self._keeper.expire, current))
