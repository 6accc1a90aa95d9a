"""How a process of a trunk ends when it is of no more use, whatever its threads wait for."""

import logging
import os
import threading

from flower_split.runtime.exit_codes import FAILED

logger = logging.getLogger(__name__)

_SECONDS = 15.0  # for calls in progress, the engine and the other replicas


def end_soon(why: str) -> None:
    """Log why, and end the process within seconds if it has not ended in order by then.

    A kernel that waits for a GPU whose process is gone waits for ever, and a thread with it.
    """
    logger.error("the trunk ends: %s", why)
    end_within(_SECONDS, FAILED)


def end_within(seconds: float, code: int) -> None:
    """End the process with ``code`` after so many seconds, if it has not ended in order by then."""
    last = threading.Timer(seconds, os._exit, (code,))
    last.daemon = True
    last.start()
