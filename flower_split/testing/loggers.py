"""The contract of a logger, checked on a run made for it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from flower_split.config import RunConfig, resolved_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.runs.loggers.logger import LoggedRun, MetricLogger
from flower_split.testing.example_runs import ROUNDS, append_lines
from flower_split.testing.failures import ConformanceError, require

_OWN = ("config.json", "versions.json", "metrics.jsonl")


def check_logger(logger: type[MetricLogger]) -> None:
    """Check that a logger keeps the contract of :class:`MetricLogger`.

    It must be made without arguments, take every kind of line of a new and of a resumed run, end
    without one, and leave the run's own files and the lines that it is told as they are.

    Args:
        logger: The class; a service that it tells must be there, or be made to answer by its author.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.runs.loggers.logger import MetricLogger
        >>> from flower_split.testing import check_logger
        >>> class Lines(MetricLogger):
        ...     def start(self, run):
        ...         self.file = (run.path / "lines.txt").open("w")
        ...     def log(self, record):
        ...         print(record["kind"], record["server_round"], file=self.file)
        ...     def close(self):
        ...         self.file.close()
        >>> check_logger(Lines)
    """
    subject = f"logger {logger.__name__}"
    try:
        logger().check()
    except TypeError as error:
        raise ConformanceError(f"{subject} must be made without arguments: {error}") from error
    with TemporaryDirectory() as folder:
        run = RunDirectory.create(RunConfig(run_dir=str(Path(folder) / "run")))
        _tell(logger, subject, run)
        append_lines(run, ROUNDS)
        _tell(logger, subject, run)
        _tell(logger, subject, run)


def _tell(logger: type[MetricLogger], subject: str, run: RunDirectory) -> None:
    before = [(run.path / name).read_bytes() for name in _OWN if (run.path / name).exists()]
    told, kept = run.metrics(), run.metrics()
    made = logger()
    what = LoggedRun(path=run.path, config=resolved_run_config(run.config), resumed=bool(told))
    about = f"a run of {len(told)} lines"
    try:
        made.start(what)
        for record in told:
            made.log(record)
        made.close()
    except Exception as error:  # whatever a plug-in raises is the finding
        raise ConformanceError(
            f"{subject} must tell {about}; it raised {type(error).__name__}: {error}"
        ) from error
    require(told == kept, subject, "leave the lines that it is told as they are")
    after = [(run.path / name).read_bytes() for name in _OWN if (run.path / name).exists()]
    require(after == before, subject, f"leave {', '.join(_OWN)} of {about} as they are")
