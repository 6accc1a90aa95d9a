"""Feed a run's loggers with the lines of its ``metrics.jsonl``, as they are written."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flower_split.config import resolved_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.runs.loggers.logger import LoggedRun, MetricLogger, Record

logger = logging.getLogger(__name__)


@contextmanager
def logged(run: RunDirectory, loggers: Sequence[MetricLogger]) -> Iterator[None]:
    """Tell ``loggers`` every line that is in the run's metrics, and every one that is appended.

    Args:
        run: The run's directory; of a resumed run, without the lines that it does not keep.
        loggers: Each is started, and closed when the block ends, however it ends.

    Raises:
        ConfigError: One cannot begin.
    """
    kept = run.metrics()
    what = LoggedRun(path=run.path, config=resolved_run_config(run.config), resumed=bool(kept))
    started: list[MetricLogger] = []
    working = list(loggers)

    def tell(record: Record) -> None:
        for one in list(working):
            if not _well(one, lambda one=one: one.log(record)):  # type: ignore[misc]
                working.remove(one)

    try:
        for one in loggers:
            one.start(what)
            started.append(one)
        for record in kept:
            tell(record)
        run.listeners.append(tell)
        yield
    finally:
        if tell in run.listeners:
            run.listeners.remove(tell)
        for one in started:
            _well(one, one.close)


def _well(one: MetricLogger, call: Callable[[], None]) -> bool:
    """Return whether ``call`` went well; a logger's fault is no reason to lose a run."""
    try:
        call()
    except Exception as error:  # a service that is gone, a full disk, a plug-in's anything
        logger.warning(
            "%s is told nothing more of this run, which goes on: %s: %s. metrics.jsonl has everything.",
            type(one).__name__,
            type(error).__name__,
            error,
        )
        return False
    return True
