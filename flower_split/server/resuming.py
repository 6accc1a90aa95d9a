"""The directory of a run: a new one, or that of the run that ``resume`` names."""

import logging

from flower_split.config import RunConfig, resolved_run_config
from flower_split.errors import RunDirectoryError
from flower_split.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

_MAY_DIFFER = (  # keys that a resumed run may change: none of them changes what is computed
    "resume",
    "run-dir",
    "join-timeout",
    "round-timeout",
    "round-retries",
    "train.client-dir",
    "trunk.address",
    "trunk.token-file",
    "trunk.root-certificates",
    "trunk.join-timeout",
    "trunk.window-timeout",
    "trunk.call-timeout",
)


def open_directory(config: RunConfig) -> RunDirectory:
    """Make a new run's directory, or open that of the run to resume.

    Raises:
        RunDirectoryError: It is no run directory, or its run had another configuration.
    """
    if not config.resume:
        directory = RunDirectory.create(config)
        logger.info("run directory: %s", directory.path)
        return directory
    directory = RunDirectory.open(config.resume)
    mine, its = resolved_run_config(config), resolved_run_config(directory.config)
    differing = [
        f"{key} = {mine[key]!r}, was {its[key]!r}"
        for key in mine
        if mine[key] != its[key] and not key.startswith(_MAY_DIFFER)
    ]
    if differing:
        raise RunDirectoryError(
            f"the run in {directory.path} began with another configuration: {'; '.join(differing)}. "
            "Resume it with its own, which is in its config.json, or begin a new run."
        )
    logger.info("going on with the run directory %s", directory.path)
    return directory
