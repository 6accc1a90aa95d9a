"""Looks once a second for calls that take longer than the trunk allows: slow senders, unread replies."""

import threading
from collections.abc import Callable

from flower_split.runtime.closing import Closing

_SECONDS = 1.0  # between two looks


class CallWatch(Closing):
    """Calls ``look`` from :meth:`start` to :meth:`close`, on a thread of its own.

    Args:
        look: Cuts off what takes too long.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, name="trunk-call-watch", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_SECONDS):
            self._look()
