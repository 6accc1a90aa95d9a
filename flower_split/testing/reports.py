"""The contract of a report, checked on run directories made for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flower_split.config import RunConfig
from flower_split.results.report.report import Report
from flower_split.results.report.rows import read_runs
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import Json
from flower_split.runs.summary import ClientOutcome, HeldOut, summarize
from flower_split.testing.failures import ConformanceError, require

_OWN = {"config.json", "versions.json", "metrics.jsonl", "summary.json", "report.md"}
_CLIENTS = ("sea", "land")
_ROUNDS = 2


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
            _make_run(root / "begun", rounds=0),
            _make_run(root / "going", rounds=1),
            _make_run(root / "done", rounds=_ROUNDS),
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


def _make_run(path: Path, rounds: int) -> Path:
    """Write the directory of a run that has come so far; it is finished after all its rounds."""
    run = RunDirectory.create(RunConfig(run_dir=str(path), num_server_rounds=_ROUNDS))
    for slot, name in enumerate(_CLIENTS):
        sizes = {"num_examples": 5, "num_eval_examples": 2, "planned_steps": 1}
        run.append("data", {"server_round": 0, "partition_id": slot, "name": name, **sizes})
    for number in range(rounds and rounds + 1):
        for slot in range(len(_CLIENTS)):
            for kind, record in _client_lines(number):
                run.append(kind, {"server_round": number, "partition_id": slot, **record})
        losses = {"train_loss": 3.0, "perplexity": 8.0 - number} if number else {}
        run.append("round", {"server_round": number, "seconds": 2.0, **losses})
        if number:
            left_out = {"1": "its gradient was not finite"} if number == 1 else {}
            run.append("trunk", {"server_round": number, "attempt": 0, "left_out": left_out})
    if rounds == _ROUNDS:
        outcomes = [
            ClientOutcome(partition_id=slot, before=HeldOut(9, 4), after=HeldOut(7, 4), name=name)
            for slot, name in enumerate(_CLIENTS)
        ]
        run.write_outcome(summarize(outcomes), facts={"seconds": 4.0}, notes=["A note."])
    return path


def _client_lines(number: int) -> list[tuple[str, Mapping[str, Json]]]:
    held_out = {"loss_sum": 9.0 - number, "num_tokens": 4, "perplexity": 8.0 - number}
    lines: list[tuple[str, Mapping[str, Json]]] = [("evaluation", held_out)]
    if number:
        lines.append(("step", {"step": 0, "loss": 3.0, "num_tokens": 7, "compute_seconds": 0.5}))
        lines.append(("bytes", {"activations_up": 1000, "adapters_down": 10}))
    return lines
