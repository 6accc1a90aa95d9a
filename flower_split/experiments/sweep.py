"""A sweep: all runs of a grid and their baselines, a directory each; what is finished stays.

::

    OUT/runs/<cell>/       one run directory for each (flower_split.runs.directory)
    OUT/logs/<cell>.log    what its processes said
    OUT/results.csv, table.md, table.tex, figure.png, figure.pdf

A run that is there with another configuration is refused, and never overwritten. One that was cut
short goes on after its last committed round, or, a baseline, begins again.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flower_split.config import RunConfig, Scalar, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.experiments.baselines import check_baseline, run_baseline
from flower_split.experiments.grid import SEED, Axes, Cell, Settings, cells_of, config_of
from flower_split.local.job import LocalJob, run_job
from flower_split.local.process import Output, RunProcess
from flower_split.runs.files import read_config
from flower_split.runs.manifest import FOLDER, RunCheckpoints
from flower_split.runs.resuming import MAY_CHANGE, ROUNDS
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY

RUNS = "runs"
_LOGS = "logs"
_LOOK_SECONDS = 0.5
_OUTCOME = "summary.json"  # written last
_MAY_DIFFER = frozenset(MAY_CHANGE) - {ROUNDS}  # deadlines and places: nothing that is computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What to run."""

    app: LocalJob  # the app; run_config is that of every run, before its own values
    axes: Axes
    baselines: Sequence[str] = ()
    also: Sequence[Settings] = ()  # variants beside the grid
    out: Path  # absolute
    jobs: int = 1  # runs at a time
    say: Callable[[str], None] = field(default=print)

    @property
    def cells(self) -> list[Cell]:
        """Return all of its runs."""
        return cells_of(self.axes, self.baselines, self.also)

    def directory(self, cell: Cell) -> Path:
        """Return a run's directory."""
        return self.out / RUNS / cell.name

    def config(self, cell: Cell) -> RunConfig:
        """Return a run's configuration.

        Raises:
            ConfigError: Its values cannot go together.
        """
        values = config_of(cell, self.axes, self.app.run_config)
        return parse_run_config({**values, "run-dir": str(self.directory(cell)), "resume": ""})


def check_sweep(sweep: Sweep) -> None:
    """Check every run's configuration, and that what is there already is of this sweep.

    Raises:
        ConfigError: A combination cannot be, or a baseline cannot; names it.
        RunDirectoryError: A directory holds another run; names it and the key.
    """
    if sweep.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; it is {sweep.jobs}.")
    for cell in sweep.cells:
        try:
            config = sweep.config(cell)
            if cell.baseline:
                check_baseline(cell.baseline, config)
        except ConfigError as error:
            raise ConfigError(f"the run {cell.name} of this sweep cannot be: {error}") from error
        directory = sweep.directory(cell)
        if (directory / "config.json").exists():
            _check_same(directory, config)


def is_finished(sweep: Sweep, cell: Cell) -> bool:
    """Return whether a run came to its end."""
    return (sweep.directory(cell) / _OUTCOME).is_file()


def run_sweep(sweep: Sweep, stopped: Callable[[], bool] = lambda: False) -> list[Cell]:
    """Run what is missing, ``sweep.jobs`` at a time.

    Call it in a process without threads that has loaded what every run needs
    (:func:`flower_split.local.job.load_modules`) and has not used torch.

    Args:
        sweep: The sweep, checked.
        stopped: Asked while runs go on; True ends them.

    Returns:
        The runs that failed.
    """
    cells = sweep.cells
    missing = [cell for cell in cells if not is_finished(sweep, cell)]
    seeds = list(sweep.axes.get(SEED, ()))
    if seeds:  # one whole comparison after the other
        missing.sort(key=lambda cell: seeds.index(dict(cell.values)[SEED]))
    sweep.say(f"{len(cells)} runs, {len(cells) - len(missing)} finished already, in {sweep.out}")
    (sweep.out / _LOGS).mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
    (sweep.out / RUNS).mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
    at_work: dict[Cell, tuple[RunProcess, float]] = {}
    failed: list[Cell] = []
    try:
        while missing or at_work:
            while missing and len(at_work) < sweep.jobs:
                cell = missing.pop(0)
                at_work[cell] = (_start(sweep, cell), time.monotonic())
                sweep.say(f"{cell.name}: begins")
            for cell, (process, start) in list(at_work.items()):
                if process.wait(_LOOK_SECONDS / len(at_work)):
                    del at_work[cell]
                    if process.exit_code or not is_finished(sweep, cell):
                        failed.append(cell)
                    outcome = f"failed; see {_log(sweep, cell)}" if cell in failed else "done"
                    left = f"{len(missing) + len(at_work)} left"
                    sweep.say(f"{cell.name}: {outcome} ({time.monotonic() - start:.0f} s, {left})")
            if stopped():
                break
    finally:
        for process, _ in at_work.values():
            process.stop()
    return failed


def _log(sweep: Sweep, cell: Cell) -> Path:
    return sweep.out / _LOGS / f"{cell.name}.log"


def _start(sweep: Sweep, cell: Cell) -> RunProcess:
    directory, config = sweep.directory(cell), sweep.config(cell)
    values: dict[str, Scalar] = {**sweep.app.run_config, **resolved_run_config(config)}
    if directory.exists():
        if not cell.baseline and RunCheckpoints(directory / FOLDER).latest() is not None:
            values["resume"] = str(directory)
        else:
            shutil.rmtree(directory)  # cut short before there was anything to go on from
    output = Output(log=_log(sweep, cell), prefix=f"{cell.name}: ", level=logging.WARNING)
    if cell.baseline:
        return RunProcess.start(lambda: run_baseline(cell.baseline, config), output)
    app = sweep.app
    job = LocalJob(
        folder=app.folder,
        server_app=app.server_app,
        client_app=app.client_app,
        run_config=values,
    )
    return RunProcess.start(lambda: run_job(job), output)


def _check_same(directory: Path, config: RunConfig) -> None:
    before, now = resolved_run_config(read_config(directory)), resolved_run_config(config)
    for key, value in now.items():
        if key not in _MAY_DIFFER and before[key] != value:
            raise RunDirectoryError(
                f"{directory} holds a run with {key} = {before[key]!r}, and this sweep has {value!r}. "
                "Name another --out, or remove that run."
            )


def outcomes(sweep: Sweep) -> Mapping[Cell, Path]:
    """Return the directories of the finished runs."""
    return {cell: sweep.directory(cell) for cell in sweep.cells if is_finished(sweep, cell)}
