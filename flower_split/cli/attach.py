"""``flower-split attach``: follow a run that goes on without the command that started it."""

from dataclasses import dataclass
from pathlib import Path

from flower_split.cli.connections import find_connection
from flower_split.cli.flwr import Flwr
from flower_split.cli.follow import FollowedRun, follow, stop
from flower_split.cli.interrupts import Interrupts
from flower_split.cli.superlink import LocalSuperLink
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.runs.files import FLOWER_FOLDER
from flower_split.runtime.exit_codes import COMPLETED, FAILED, STILL_AT_WORK


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachCommand:
    """What the command line asks for."""

    run: str  # a run directory, or Flower's run id
    superlink: str | None = None  # with a run id: name of a SuperLink connection
    stream: bool = False  # show every line of the log
    stop: bool = False  # stop the run instead of following it


def attach(command: AttachCommand) -> int:
    """Follow a run to its end, or stop it, and return the exit code.

    Raises:
        ConfigError: ``command.run`` is neither a run directory nor a run id.
        RunDirectoryError: The run was not started by ``flower-split run`` on this machine.
    """
    directory = Path(command.run).expanduser().absolute()
    with Interrupts() as interrupts:
        if directory.is_dir():
            return _attach_locally(directory, command, interrupts)
        if not command.run.isdigit():
            raise ConfigError(
                f"attach takes a run directory or Flower's run id; {command.run!r} is neither."
            )
        connection = find_connection(command.superlink)
        print(f"SuperLink: {connection.name or 'default'} at {connection.address}", flush=True)
        run = FollowedRun(run_id=command.run, flwr=Flwr(connection=connection.name))
        run.flwr.status(run.run_id)  # said at once, if the SuperLink does not know it
        return _follow_or_stop(run, command, interrupts)


def _attach_locally(directory: Path, command: AttachCommand, interrupts: Interrupts) -> int:
    link = LocalSuperLink.find(directory)
    if link is None:
        raise RunDirectoryError(
            f"{directory} has no {FLOWER_FOLDER}/ of a local SuperLink: no flower-split run on this "
            "machine started its run. Name the run id and the SuperLink connection instead."
        )
    if not link.alive:
        if (directory / "summary.json").is_file():
            print(f"the run in {directory} has ended; see report.md there")
            return COMPLETED
        print(
            f"the run in {directory} does not go on: its SuperLink (process {link.state.pid}) has "
            f"ended. Resume it with: flower-split run APP --resume {directory}"
        )
        return FAILED
    if not link.state.run_id:
        link.end()
        raise RunDirectoryError(
            f"{directory}: no run was submitted to its SuperLink, which has now been ended. Start "
            "the run again."
        )
    print(f"SuperLink: its own, {link.describe()}", flush=True)
    run = FollowedRun(
        run_id=link.state.run_id,
        flwr=link.flwr,
        superlink=link,
        directory=directory,
        log=link.run_log,
    )
    goes_on = True  # until its end is known: it was not this command that started it
    try:
        code = _follow_or_stop(run, command, interrupts)
        goes_on = code in STILL_AT_WORK
        return code
    finally:
        if not goes_on:
            link.end()


def _follow_or_stop(run: FollowedRun, command: AttachCommand, interrupts: Interrupts) -> int:
    if command.stop:
        return stop(run, interrupts)
    return follow(run, interrupts, stream=command.stream)
