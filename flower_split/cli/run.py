"""``flower-split run``: ``flwr run`` with checks beforehand and a true outcome afterwards.

First what takes no second: command line, configuration, directories, files. Then what needs torch.
Only then a SuperLink is started, or asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flower_split.cli.app_config import App, load_app
from flower_split.cli.connections import LOCAL, Connection, find_connection
from flower_split.cli.flwr import Flwr
from flower_split.cli.follow import FollowedRun, follow
from flower_split.cli.interrupts import Interrupts
from flower_split.cli.overrides import parse_overrides
from flower_split.cli.paths import absolute_paths, as_run_config, new_run_directory
from flower_split.cli.superlink import LocalSuperLink
from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.config.combinations import check_named_strategy
from flower_split.errors import ConfigError
from flower_split.runs.beforehand import check_directory, check_files
from flower_split.runs.files import read_config
from flower_split.runs.resuming import resumed_config
from flower_split.runtime.exit_codes import COMPLETED, STILL_AT_WORK


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCommand:
    """What the command line asks for."""

    app: Path  # the app's directory
    superlink: str | None = None  # name of a SuperLink connection; None: Flower's default
    run_config: Sequence[str] | None = None  # values of --run-config
    federation_config: str | None = None  # None: what the job needs
    stream: bool = False  # show every line of the log
    resume: Path | None = None  # the directory of a run to go on with; None: a new run
    local: bool = False  # without Flower's SuperLink and Ray


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run that is ready to be submitted."""

    app: App
    command: RunCommand
    connection: Connection
    config: RunConfig
    overrides: Mapping[str, Scalar]  # of the app's configuration

    @property
    def directory(self) -> Path:
        """Return the run's directory, as the command and a local ServerApp see it."""
        return Path(self.config.resume or self.config.run_dir)


def run_app(command: RunCommand) -> int:
    """Check, submit, follow, and return the exit code; see :mod:`flower_split.runtime.exit_codes`.

    Raises:
        FlowerSplitError: A check failed, or Flower did not take the run.
    """
    if command.local and (command.superlink or command.federation_config):
        raise ConfigError(
            "--local runs without a SuperLink and without Flower's simulation, so it takes no "
            "SuperLink connection and no --federation-config. Leave --local or these out."
        )
    job = prepare(command, Path.cwd())
    if command.local:
        from flower_split.cli.run_local import run_local

        return run_local(job)
    options = _checked_options(job)
    with Interrupts() as interrupts:
        if job.connection.is_local:
            code = _run_locally(job, options, interrupts)
            if code == COMPLETED:
                from flower_split.cli.report import write_reports_of

                write_reports_of(job.directory)
            return code
        flwr = Flwr(connection=job.connection.name)
        print(f"SuperLink: {job.connection.name or 'default'} at {job.connection.address}")
        run_id = flwr.start_run(str(command.app), options)
        print(f"run {run_id}", flush=True)
        return follow(FollowedRun(run_id=run_id, flwr=flwr), interrupts, stream=command.stream)


def prepare(command: RunCommand, here: Path) -> Job:
    """Do every check that needs neither torch nor Flower, and resolve the configuration.

    Args:
        command: What is asked for.
        here: The directory that relative paths are meant from.

    Raises:
        FlowerSplitError: Something is wrong; nothing was started.
    """
    app = load_app(command.app)
    connection = LOCAL if command.local else find_connection(command.superlink)
    given = parse_overrides(command.run_config)
    if command.resume is not None:
        given["resume"] = str(command.resume)
    config = app.config(given)
    if config.resume:
        directory = (here / Path(config.resume).expanduser()).resolve()
        given["resume"] = str(directory)
        config = resumed_config(read_config(directory), given)
    elif connection.is_local and not config.run_dir:
        config = replace(config, run_dir=str(new_run_directory(here)))
    if connection.is_local:
        config = parse_run_config(absolute_paths(config, here))
        check_directory(config)
    if not app.has_own_server_app:
        check_named_strategy(config)
    check_files(config, simulated=connection.is_local)
    overrides = app.overrides_for(config)
    return Job(app=app, command=command, connection=connection, config=config, overrides=overrides)


def _checked_options(job: Job) -> list[str]:
    """Do the checks that need torch, and return the options of ``flwr run``."""
    from flower_split.cli import preflight

    config, given = job.config, job.command.federation_config
    job.app.make_importable()
    preflight.check_aggregation(config)
    adapter, scales = preflight.check_model(config)
    preflight.check_trunk(config, hosted=not job.connection.is_local)
    options: list[str] = []
    if job.connection.is_local:
        from flower_split.cli.report import check_reports

        check_reports(config)
        preflight.check_loggers(config)
        given = preflight.simulation_settings(config, given)
        if not (job.app.has_own_server_app or config.model.cuts_by_partition):
            preflight.check_clients(config, adapter, scales, given)
    if given:
        options += ["--federation-config", given]
    if job.overrides:
        options += ["--run-config", as_run_config(job.overrides)]
    return options


def _run_locally(job: Job, options: Sequence[str], interrupts: Interrupts) -> int:
    """Run under a SuperLink of the run's own, which ends with it."""
    link = LocalSuperLink.start(job.directory, given_up=lambda: interrupts.count > 0)
    goes_on = False
    try:
        print(f"SuperLink: its own, {link.describe()}", flush=True)
        run_id = link.flwr.start_run(str(job.command.app), options)
        link.note_run(run_id)
        print(f"run {run_id} in {job.directory}", flush=True)
        run = FollowedRun(
            run_id=run_id, flwr=link.flwr, superlink=link, directory=job.directory, log=link.run_log
        )
        code = follow(run, interrupts, stream=job.command.stream)
        goes_on = code in STILL_AT_WORK
        return code
    finally:
        if not goes_on:
            link.end()
