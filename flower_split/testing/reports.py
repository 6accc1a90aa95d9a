"""The contract of a report, checked on run directories made for it."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flower_split.results.report.report import Report
from flower_split.results.report.rows import read_runs
from flower_split.testing.example_runs import ROUNDS, make_run
from flower_split.testing.failures import ConformanceError, require

_OWN = {"config.json", "versions.json", "metrics.jsonl", "summary.json", "report.md"}


def check_report(report: type[Report]) -> None:
    """Check that a report keeps the contract of :class:`flower_split.results.report.report.Report`.

    It must be made without arguments, write its one file and nothing beside it, write the same file
    again, and show a run that has not begun, one that goes on, one that is finished, and several.

    Args:
        report: The class.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.results.report.report import Report
        >>> from flower_split.testing import check_report
        >>> class Names(Report):
        ...     file = "names.txt"
        ...     def write(self, runs, out):
        ...         out.write_text(", ".join(run.name for run in runs))
        >>> check_report(Names)
    """
    subject = f"report {report.__name__}"
    name = getattr(report, "file", "")
    require(
        isinstance(name, str) and Path(name).name == name != "" and name not in _OWN,
        subject,
        f"have in file the name of a file that is none of the run directory's own; it is {name!r}",
    )
    try:
        report().check()
    except TypeError as error:
        raise ConformanceError(f"{subject} must be made without arguments: {error}") from error
    with TemporaryDirectory() as folder:
        root = Path(folder)
        runs = [
            make_run(root / "begun", rounds=0),
            make_run(root / "going", rounds=1),
            make_run(root / "done", rounds=ROUNDS),
        ]
        for run in runs:
            _check_file(report, subject, [run], run / name)
        _check_file(report, subject, runs, root / name)


def _check_file(report: type[Report], subject: str, runs: Sequence[Path], out: Path) -> None:
    about = f"about {', '.join(run.name for run in runs)}"
    before = _contents(out.parent)
    written = []
    for _ in range(2):
        try:
            report().write(read_runs(runs), out)
        except Exception as error:  # whatever a plug-in raises is the finding
            raise ConformanceError(
                f"{subject} must write a file {about}; it raised {type(error).__name__}: {error}"
            ) from error
        after = _contents(out.parent)
        require(bool(after.get(out)), subject, f"write its file {about}; it is missing or empty")
        written.append(after.pop(out))
        require(
            after == {path: content for path, content in before.items() if path != out},
            subject,
            f"write nothing but its file {about}",
        )
    require(written[0] == written[1], subject, f"write the same file again {about}")


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
