"""Tell a trunk that runs elsewhere that this ServerApp lives, so that its rounds end with it.

A ServerApp that is killed with its SuperLink says nothing any more. Without this, the clients of its
open round would train it to its end, for nobody.
"""

import logging
import threading
from typing import Protocol

from flower_split.errors import TrunkError
from flower_split.runtime.closing import Closing

logger = logging.getLogger(__name__)

LEASE_SECONDS = 75.0
"""Of a round without a word of its coordinator; longer than a connection may be cut."""
_SECONDS = 10.0  # between two words


class Alive(Protocol):
    """What takes the word."""

    def keep_alive(self) -> None:
        """Say that the coordinator lives.

        Raises:
            TrunkError: The trunk does not answer, or refuses the call.
        """


class Heartbeat(Closing):
    """Says so every few seconds, on a thread of its own, until it is closed.

    Args:
        trunk: Whom to tell.
        seconds: Between two words.
    """

    def __init__(self, trunk: Alive, seconds: float = _SECONDS) -> None:
        self._trunk = trunk
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=2 * _SECONDS)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._trunk.keep_alive()
            except TrunkError as error:  # the round loop asks for itself, and acts on it
                logger.debug("the trunk was not told that this run lives: %s", error)
