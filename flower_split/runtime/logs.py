"""Log lines of this package on standard error, where Flower picks them up and streams them."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.runtime.log_fields import PROCESS_FIELDS

MARK = "flower-split  "
"""Begins every line, so that they can be told from Flower's and Ray's in one stream."""


LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
LEVEL_VARIABLE, FORMAT_VARIABLE = "FLOWER_SPLIT_LOG_LEVEL", "FLOWER_SPLIT_LOG_FORMAT"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """How much is logged, and in which form."""

    level: str = ""  # one of LEVELS; empty: what the process shows by itself
    form: str = "text"  # text, or json: an object on each line
    times: bool = False  # text lines begin with the time, in UTC; JSON always has it

    def __post_init__(self) -> None:
        """Check the values."""
        if self.level and self.level not in LEVELS:
            raise ConfigError(f"the log level must be one of {LEVELS}; it is {self.level!r}.")
        if self.form not in FORMATS:
            raise ConfigError(f"the log format must be one of {FORMATS}; it is {self.form!r}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "LogSettings":
        """Return what the two variables say, for processes that Flower starts.

        Raises:
            ConfigError: One has a value that is none.
        """
        return cls(
            level=environment.get(LEVEL_VARIABLE, "").lower(),
            form=environment.get(FORMAT_VARIABLE, "").lower() or "text",
        )


def _utc(created: float) -> str:
    """Return a time as ISO 8601 has it, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    return f"{whole}.{int(created % 1 * 1000):03d}Z"


class JsonLines(logging.Formatter):
    """An object on each line: time (UTC), level, logger, message, error, and the fields of the round."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as text."""
        line: dict[str, str | int] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **PROCESS_FIELDS.of(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TimedLines(logging.Formatter):
    """Text with the time in UTC and the level, for processes whose log is a file or a journal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as text."""
        return f"{_utc(record.created)} {record.levelname} {super().format(record)}"


class MarkedLines(logging.Formatter):
    """Every line of a record begins with :data:`MARK`; the level is named from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one record as text."""
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        return "\n".join((MARK + line).rstrip() for line in text.split("\n"))


def log_to_stderr(level: int = logging.INFO, settings: LogSettings | None = None) -> None:
    """Attach one handler to this package's logger; calling it again changes nothing.

    Only the edges call this (ServerApp, ClientApp, CLI): a library leaves logging to its user.

    Args:
        level: What is shown where the settings name no level.
        settings: None: those of the environment.

    Raises:
        ConfigError: The environment's cannot be.
    """
    logger = logging.getLogger("flower_split")
    if not logger.handlers:
        settings = settings or LogSettings.from_environment(os.environ)
        logger.setLevel(settings.level.upper() or level)
        handler = logging.StreamHandler(sys.stderr)
        text = TimedLines() if settings.times else MarkedLines()
        handler.setFormatter(JsonLines() if settings.form == "json" else text)
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
