"""Looks once a second for what takes longer than the trunk allows: calls, and silent coordinators."""

import threading
from collections.abc import Callable

from flower_split.runtime.closing import Closing

_SECONDS = 1.0  # between two looks


class CallWatch(Closing):
    """Calls ``look`` from :meth:`start` to :meth:`close`, on a thread of its own.

    Args:
        look: Ends what takes too long.
        name: Name of the thread.
    """

    def __init__(self, look: Callable[[], None], name: str = "trunk-call-watch") -> None:
        self._look = look
        self._name = name
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_SECONDS):
            self._look()
