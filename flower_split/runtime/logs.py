"""Log lines of this package on standard error, where Flower picks them up and streams them."""

import logging
import sys

from flower_split.errors import FlowerSplitError

MARK = "flower-split  "
"""Begins every line, so that they can be told from Flower's and Ray's in one stream."""


class MarkedLines(logging.Formatter):
    """Every line of a record begins with :data:`MARK`; the level is named from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as text."""
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        return "\n".join((MARK + line).rstrip() for line in text.split("\n"))


def log_to_stderr(level: int = logging.INFO) -> None:
    """Attach one handler to this package's logger; calling it again changes nothing.

    Only the edges call this (ServerApp, ClientApp, CLI): a library leaves logging to its user.
    """
    logger = logging.getLogger("flower_split")
    if not logger.handlers:
        logger.setLevel(level)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(MarkedLines())
        logger.addHandler(handler)
        logger.propagate = False


class OwnErrorsAsParagraphs(logging.Filter):
    """Take the traceback off records of this package's errors: their text says what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FlowerSplitError):
            record.msg, record.args = f"{record.getMessage()}: {error}", ()
            record.exc_info, record.exc_text = None, None
        return True


def shorten_flowers_errors() -> None:
    """Have Flower log an error of this package as one paragraph; calling it again changes nothing."""
    logger = logging.getLogger("flwr")
    if not any(isinstance(item, OwnErrorsAsParagraphs) for item in logger.filters):
        logger.addFilter(OwnErrorsAsParagraphs())


def quiet_libraries() -> None:
    """Keep libraries' progress bars and remarks on every call out of the run's log.

    Every actor would repeat them; errors still come as exceptions.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every matrix product
