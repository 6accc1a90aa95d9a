"""Log lines of this package on standard error, where Flower picks them up and streams them."""

import logging
import sys

_FORMAT = "%(levelname)s :      %(message)s"  # as Flower's own lines look


def log_to_stderr(level: int = logging.INFO) -> None:
    """Attach one handler to this package's logger; calling it again changes nothing.

    Only the edges call this (ServerApp, ClientApp, CLI): a library leaves logging to its user.
    """
    logger = logging.getLogger("flower_split")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.propagate = False
