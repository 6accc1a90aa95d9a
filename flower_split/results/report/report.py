"""What a report is, and the reports by name: those built in, and those of installed distributions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, TypeGuard

from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.results.report.page import FILE, check_can_be_written, write_page
from flower_split.results.report.rows import RunData, read_runs
from flower_split.runtime.registry import Registry


class Report(ABC):
    """One file about runs; register one in the entry-point group ``flower_split.reports``.

    An instance is made without arguments for each file. It is made of what it is handed alone, so that
    a report can be written again from the run's directory.
    """

    file: ClassVar[str]
    """Its name in a run's directory, such as ``rounds.csv``; none of the directory's own."""

    @abstractmethod
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        """Write the file ``out``, and nothing beside it; one that is there is replaced.

        Args:
            runs: At least one; the first is what the others are compared with. A run without a
                ``summary`` goes on, or has failed, and is shown as far as it is.
            out: The file; its directory is there.
        """

    def check(self) -> None:  # noqa: B027 - a report may need nothing
        """Check, before a run starts, that what :meth:`write` needs is installed.

        Raises:
            ConfigError: It is not; names the remedy.
        """


class HtmlReport(Report):
    """The page with charts."""

    file: ClassVar[str] = FILE

    def write(self, runs: Sequence[RunData], out: Path) -> None:
        """See :class:`Report`."""
        write_page(runs, out)

    def check(self) -> None:
        """Check that the extra ``report`` is installed."""
        check_can_be_written()


def _is_report(found: object) -> TypeGuard[type[Report]]:
    return isinstance(found, type) and issubclass(found, Report)


HTML = "html"
REPORTS: Registry[type[Report]] = Registry(
    group="flower_split.reports",
    key="report",
    form="a subclass of flower_split.results.report.report.Report",
    machines="flower-split runs",
    built_in=MappingProxyType({HTML: HtmlReport}),
    accepts=_is_report,
    error=ConfigError,
)


def make_report(name: str) -> Report:
    """Return a report by its name, checked.

    Args:
        name: ``html``, an entry point's, or an import path ``"module:Class"``.

    Raises:
        ConfigError: It is unknown, cannot be imported, is no report that can be made without
            arguments, or lacks what it needs.
    """
    made = REPORTS.get(name)
    try:
        report = made()
    except Exception as error:  # a plug-in may raise anything, and be abstract still
        raise ConfigError(
            f"report {name!r} cannot be made without arguments: {type(error).__name__}: {error}. "
            "Correct the plug-in."
        ) from error
    report.check()
    return report


def write_report_file(report: Report, runs: Sequence[Path], out: Path) -> Path:
    """Write one report about run directories, and return its file.

    Raises:
        RunDirectoryError: One is no run directory, or a file of it is damaged.
        FlowerSplitError: The report failed.
    """
    data = read_runs(runs)
    try:
        report.write(data, out)
    except FlowerSplitError:
        raise
    except Exception as error:  # a plug-in may raise anything
        raise FlowerSplitError(
            f"the report {type(report).__name__} cannot be written to {out}: "
            f"{type(error).__name__}: {error}. The run's directory is whole: correct the plug-in, "
            "and write it again with flower-split report."
        ) from error
    return out
