"""What a logger is: it is told every line of ``metrics.jsonl`` when it has been written."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from flower_split.config import Scalar
from flower_split.errors import ConfigError
from flower_split.runs.files import Json

Record = Mapping[str, Json]
"""One line of ``metrics.jsonl``; :data:`flower_split.runs.metrics.SCHEMA` says what it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """The run that a logger is told of."""

    path: Path  # its directory
    config: Mapping[str, Scalar]  # flat, every key
    resumed: bool  # it goes on; the lines that it keeps are told again first

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name


class MetricLogger(ABC):
    """Tells others how a run goes; register one in the entry-point group ``flower_split.loggers``.

    An instance is made without arguments for each run, and used by one thread: :meth:`start`, then
    :meth:`log` for every line, then :meth:`close`, also of a run that fails. What :meth:`start` raises
    ends the run before it begins; what the others raise is a warning, and ends the logger alone.
    """

    @abstractmethod
    def start(self, run: LoggedRun) -> None:
        """Begin. Of a resumed run, what a former process has told is told again from its beginning."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """Tell one line; between two steps of a round, so it must not wait for long."""

    @abstractmethod
    def close(self) -> None:
        """End, with everything told."""

    def check(self) -> None:  # noqa: B027 - a logger may need nothing
        """Check, before a run starts, that what the logger needs is installed.

        Raises:
            ConfigError: It is not; names the remedy.
        """


class PackageLogger(MetricLogger):
    """A logger that needs a package of an extra."""

    package: ClassVar[str]  # to import
    extra: ClassVar[str]  # of flower-split, and the logger's name

    def check(self) -> None:
        """Check that the package is installed."""
        if importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f'train.report-to names "{self.extra}", which needs the package {self.package}, and it is '
                "not installed where the ServerApp runs. Install it: pip install "
                f"'flower-split[{self.extra}]'."
            )
