"""``flower-split report``, and the reports that a finished run gets by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.results.report.page import can_be_written, write_figures
from flower_split.results.report.report import HTML, make_report, write_report_file
from flower_split.runs.files import read_config
from flower_split.runtime.exit_codes import COMPLETED


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportCommand:
    """What the command line asks for."""

    runs: Sequence[Path]
    form: str = HTML
    out: Path | None = None  # None: in the run directory, of one run
    figures: Path | None = None


def report(command: ReportCommand) -> int:
    """Write a report about runs, and return the exit code.

    Raises:
        ConfigError: Several runs have no directory of their own for a report, the report is unknown,
            or it lacks what it needs.
        RunDirectoryError: One is no run directory.
        FlowerSplitError: The report failed.
    """
    made, out = make_report(command.form), command.out
    if command.figures is not None and command.form != HTML:
        raise ConfigError(f"--figures are the charts of the report {HTML!r}. Leave --form out.")
    if out is None:
        if len(command.runs) > 1:
            raise ConfigError("a report on several runs needs a file to go to: --out FILE.")
        out = command.runs[0].expanduser() / made.file
    print(f"report: {write_report_file(made, command.runs, out)}")
    if command.figures is not None:
        write_figures(command.runs, command.figures)
    return COMPLETED


def check_reports(config: RunConfig) -> None:
    """Check, before a run starts, that the reports of ``report`` can be written when it ends.

    Raises:
        ConfigError: One is unknown, or lacks what it needs.
    """
    for name in _written(config):
        make_report(name)


def write_reports_of(directory: Path) -> None:
    """Write into a finished run's directory the reports that its configuration names.

    Raises:
        FlowerSplitError: One failed; those before it are there.
    """
    if not (directory / "summary.json").is_file():
        return
    for name in _written(read_config(directory)):
        made = make_report(name)
        print(f"report: {write_report_file(made, [directory], directory / made.file)}", flush=True)


def _written(config: RunConfig) -> list[str]:
    """Return the names of ``report``; ``html``, the default, only where its extra is installed."""
    return [name for name in config.reports if name != HTML or can_be_written()]
