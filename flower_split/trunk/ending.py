"""How a trunk's process ends when it can serve no more, whatever its compute thread waits for."""

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
    last = threading.Timer(_SECONDS, os._exit, (FAILED,))
    last.daemon = True
    last.start()
