"""``flower-split sweep``: all runs of a grid and their baselines, and one table of them."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flower_split.cli.app_config import load_app
from flower_split.cli.interrupts import Interrupts
from flower_split.cli.overrides import flatten, parse_overrides
from flower_split.cli.paths import absolute_paths
from flower_split.config import Scalar
from flower_split.errors import ConfigError
from flower_split.experiments.grid import Axes, checked_axis, parse_grid
from flower_split.experiments.protocols import Limits, write_protocols
from flower_split.experiments.results import Demand, RunResult, read_result
from flower_split.experiments.sweep import Sweep, check_sweep, outcomes, run_sweep
from flower_split.experiments.table import check_libraries, write_results
from flower_split.local.job import LocalJob, load_modules
from flower_split.runtime.exit_codes import COMPLETED, FAILED, STOPPED

_KEYS = ("app", "grid", "also", "baselines", "run-config")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepCommand:
    """What the command line asks for."""

    what: Path  # an app's directory, or a sweep's TOML file
    grid: str | None = None
    also: Sequence[str] | None = None  # values of --also
    baselines: str | None = None  # separated by commas
    out: Path
    jobs: int = 1
    run_config: Sequence[str] | None = None  # values of --run-config
    limits: Limits = Limits()  # what is asked beside the table


@dataclass(frozen=True, kw_only=True, slots=True)
class _Described:
    """What a sweep's TOML file says."""

    app: Path
    axes: Axes = field(default_factory=dict)
    also: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    run_config: Mapping[str, Scalar] = field(default_factory=dict)


def sweep(command: SweepCommand) -> int:
    """Run what is missing of a sweep, print its table, and return the exit code.

    Raises:
        FlowerSplitError: The sweep cannot be; nothing was started.
    """
    wanted = prepare(command, Path.cwd())
    check_sweep(wanted)
    command.limits.check(wanted.axes)
    check_libraries()
    load_modules()  # before the forks, so that every process has them
    with Interrupts() as interrupts:
        failed = run_sweep(wanted, stopped=lambda: interrupts.count > 0)
        stopped = interrupts.count > 0
    found = outcomes(wanted)
    if found:
        results = _with_demand(wanted, [read_result(*item) for item in found.items()])
        print(f"\n{write_results(wanted.out, results, wanted.axes)}\n")
        if command.limits.asked:
            print(f"{write_protocols(wanted.out, results, found, wanted.axes, command.limits)}\n")
        print(f"{len(found)} of {len(wanted.cells)} runs; tables and figure in {wanted.out}")
    if stopped or failed:
        why = "the sweep was stopped" if stopped else f"{len(failed)} runs failed"
        print(f"flower-split: {why}. The same command runs what is missing.", file=sys.stderr)
    return STOPPED if stopped else FAILED if failed else COMPLETED


def _with_demand(wanted: Sweep, results: Sequence[RunResult]) -> list[RunResult]:
    """Return the results with what training asks of the machines, worked out once for all seeds."""
    from flower_split.cli.plan.demand import demand_of

    known: dict[tuple[str, object], Demand | None] = {}
    made = []
    for result in results:
        cell = result.cell
        variant = cell.baseline, cell.variant
        if variant not in known:
            known[variant] = demand_of(wanted.config(cell), cell.baseline)
        made.append(replace(result, demand=known[variant]))
    return made


def prepare(command: SweepCommand, here: Path) -> Sweep:
    """Read what the command line and the sweep's file ask for.

    Args:
        command: What is asked for; options come before what the file says.
        here: The directory that relative paths are meant from.

    Raises:
        ConfigError: The app, the grid, a baseline or a key is wrong.
    """
    described = _described(command.what)
    app = load_app(described.app)
    overrides = {**described.run_config, **parse_overrides(command.run_config)}
    config = replace(app.config(overrides), run_dir="", resume="")
    axes = described.axes if command.grid is None else parse_grid(command.grid)
    if not axes:
        raise ConfigError("a sweep needs a grid: --grid 'seed=0,1,2 mode=joint,frozen'.")
    app.check_keys({key: values[0] for key, values in axes.items()})
    texts = command.also
    if texts is None:  # the file's are beside the file's own grid
        texts = described.also if command.grid is None else ()
    also = [parse_overrides([text]) for text in texts]
    for settings in also:
        app.check_keys(settings)
    baselines = described.baselines
    if command.baselines is not None:
        baselines = tuple(filter(None, command.baselines.split(",")))
    return Sweep(
        app=LocalJob(
            folder=app.project.parent.absolute(),
            server_app=app.server_app,
            client_app=app.client_app,
            run_config={**app.values, **absolute_paths(config, here)},
        ),
        axes=axes,
        also=also,
        baselines=baselines,
        out=(here / command.out.expanduser()).resolve(),
        jobs=command.jobs,
    )


def _described(path: Path) -> _Described:
    if path.suffix != ".toml":
        return _Described(app=path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the sweep {path} cannot be read: {error}. Correct the file.") from error
    unknown = sorted(table.keys() - set(_KEYS))
    app, grid, baselines = table.get("app"), table.get("grid", {}), table.get("baselines", [])
    config, also = table.get("run-config", {}), table.get("also", [])
    well = isinstance(app, str) and isinstance(grid, dict) and isinstance(config, dict)
    well = well and isinstance(baselines, list) and isinstance(also, list)
    if unknown or not well:
        raise ConfigError(
            f"the sweep {path} must have app (a directory, from the file's), and may have the tables "
            "grid (key = list of values) and run-config, and the lists baselines and also (further "
            "variants, as KEY=VALUE …)"
            + (f"; it has {', '.join(unknown)}." if unknown else "; one of them is something else.")
        )
    return _Described(
        app=path.parent / str(app),
        axes=dict(_axes(grid, path)),
        also=tuple(str(text) for text in also),
        baselines=tuple(str(name) for name in baselines),
        run_config=flatten(config),
    )


def _axes(
    table: Mapping[str, object], path: Path, prefix: str = ""
) -> list[tuple[str, tuple[Scalar, ...]]]:
    axes = []
    for name, values in table.items():
        key = prefix + name
        if isinstance(values, dict):
            axes += _axes(values, path, f"{key}.")
        elif isinstance(values, list) and values:
            axes.append((key, checked_axis(key, values)))
        else:
            raise ConfigError(f"{path}: grid.{key} must be a list of values; it is {values!r}.")
    return axes
