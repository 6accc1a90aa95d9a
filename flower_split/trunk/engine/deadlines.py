"""Deadline thread: expires windows and leases, frees unused key-value caches, looks who is late."""

import threading
from collections.abc import Callable

from flower_split.trunk.engine.round_index import RoundIndex

_LONGEST_SLEEP = 1.0  # seconds


class Deadlines:
    """Wakes at the open window's deadline and asks for its expiry.

    It decides under the engine's lock and acts without it: ``expire`` waits for the compute thread,
    which takes that lock.

    Args:
        index: Finds the open round; holds the engine's lock.
        expire: Acts on what has ended; called without the lock.
        free_caches: Frees key-value caches that nobody uses any more; called once a second.
        look: Notes who is waited for; called once a second, without the lock.
    """

    def __init__(
        self,
        index: RoundIndex,
        expire: Callable[[], None],
        free_caches: Callable[[], None],
        look: Callable[[], None],
    ) -> None:
        self._index = index
        self._expire = expire
        self._free_caches = free_caches
        self._look = look
        self._next_look = index.clock()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="trunk-deadlines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._index.changed:
            self._closed = True
            self._index.changed.notify_all()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while True:
            with self._index.changed:
                if self._closed:
                    return
                left = self._index.deadline - self._index.clock()
                due = left <= 0 or self._index.has_silent()
                if not due:
                    self._index.changed.wait(min(left, _LONGEST_SLEEP))
            if due:
                self._expire()
            elif not self._closed:  # the compute thread may have ended with it
                self._free_caches()
                self._look_now_and_then()

    def _look_now_and_then(self) -> None:
        """Look once a second at most: every change of a round wakes this thread."""
        now = self._index.clock()
        if now >= self._next_look:
            self._next_look = now + _LONGEST_SLEEP
            self._look()
