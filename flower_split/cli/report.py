"""``flower-split report``, and the report that a finished run gets by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.results.report.page import FILE, can_be_written, write_report
from flower_split.runtime.exit_codes import COMPLETED


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportCommand:
    """What the command line asks for."""

    runs: Sequence[Path]
    out: Path | None = None  # None: in the run directory, of one run
    figures: Path | None = None


def report(command: ReportCommand) -> int:
    """Write a page about runs, and return the exit code.

    Raises:
        ConfigError: Several runs have no directory of their own for a page, or the extra is missing.
        RunDirectoryError: One is no run directory.
    """
    out = command.out
    if out is None:
        if len(command.runs) > 1:
            raise ConfigError("a report on several runs needs a file to go to: --out FILE.html.")
        out = command.runs[0].expanduser() / FILE
    print(f"report: {write_report(command.runs, out, command.figures)}")
    return COMPLETED


def write_report_of(directory: Path) -> None:
    """Write a finished run's report into its directory, where the extra is installed."""
    if can_be_written() and (directory / "summary.json").is_file():
        print(f"report: {write_report([directory], directory / FILE)}", flush=True)
