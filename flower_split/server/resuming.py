"""Begin a run or go on with one: its directory, where it stands, and how it is resumed."""

import contextlib
import logging
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

from flwr.serverapp.strategy import Strategy

from flower_split.config import RunConfig
from flower_split.protocol.values import RoundBase
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import CommittedRound
from flower_split.server.inner.state import state_is_known
from flower_split.server.trunk_rounds import StartingPoint

logger = logging.getLogger(__name__)


def open_directory(config: RunConfig) -> RunDirectory:
    """Make a new run's directory, or open that of the run to resume.

    Raises:
        RunDirectoryError: It is no run directory, or its run had another configuration.
    """
    if not config.resume:
        directory = RunDirectory.create(config)
        logger.info("run directory: %s", directory.path)
        return directory
    directory = RunDirectory.resume(config)
    logger.info("going on with the run directory %s", directory.path)
    return directory


def starting_point(directory: RunDirectory, entry: CommittedRound | None) -> StartingPoint:
    """Return where the run's rounds begin on the trunk.

    Args:
        directory: The run's directory; a new experiment is named after it.
        entry: The committed round to go on after; None: a new run.
    """
    if entry is None:
        return StartingPoint(f"{directory.path.name}-{secrets.token_hex(4)}", base=RoundBase(0))
    logger.info("going on after round %d of experiment %s", entry.server_round, entry.experiment)
    base = RoundBase(entry.server_round, entry.trunk_digest)
    return StartingPoint(entry.experiment, entry.attempt + 1, base)  # an attempt nobody has used


@contextlib.contextmanager
def resume_command(path: Path, inner: Strategy) -> Iterator[None]:
    """Add the command that resumes the run, as a note, to whatever error ends it.

    Use it once round 0 is committed. A run whose inner strategy has a state that is not known gets
    no command, as it cannot be resumed.
    """
    try:
        yield
    except Exception as error:
        if state_is_known(inner):
            error.add_note(
                "Go on from the last committed round with: flower-split run APP --resume "
                + shlex.quote(str(path))
            )
        raise
