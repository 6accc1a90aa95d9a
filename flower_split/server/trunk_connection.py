"""The trunk of a run, wherever it runs: start it on loopback, or reach the one that has an address."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flower_split.config import RunConfig
from flower_split.errors import ConfigError, TrunkError, TrunkRefused, TrunkUnavailable
from flower_split.parties.experiment_settings import brought, experiment_fingerprint, is_of_base
from flower_split.parties.fingerprint import differences, differing_fields, settings
from flower_split.parties.protocol_versions import protocol_problem
from flower_split.protocol.values import TrunkStatus
from flower_split.runtime.secret_files import TokenFile, token_in
from flower_split.runtime.version import __version__
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.heartbeat import Heartbeat
from flower_split.server.trunk_access import Coordinator, TrunkAccess, TrunkHealth
from flower_split.server.trunk_child import TrunkChild
from flower_split.server.trunk_process import TrunkProcess
from flower_split.server.trunk_rounds import StartingPoint, stand_at_base
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate

logger = logging.getLogger(__name__)

_CONTROL_SECONDS = 60.0  # deadline of one control call to the trunk


@dataclass(frozen=True, slots=True)
class ConnectedTrunk:
    """The trunk of this run, as it answered when the run began."""

    coordinator: Coordinator
    access: TrunkAccess
    fingerprint: Mapping[str, str]  # of its model and configuration, by field
    health: TrunkHealth
    package_version: str = ""  # of flower-split; empty: it does not tell


@contextlib.contextmanager
def connect_trunk(
    config: RunConfig, checkpoints: Path, ready: TrunkChild | None = None
) -> Iterator[ConnectedTrunk]:
    """Start a trunk on loopback, or reach the one that ``trunk.address`` names.

    Args:
        config: The run's configuration.
        checkpoints: Where a trunk that is started here keeps its rounds.
        ready: A process that waits to become a trunk that is started here; None: there is none.

    Yields:
        The trunk, which serves. One that was started here ends with the block.

    Raises:
        TrunkUnavailable: It does not start, or does not answer.
        ConfigError: The token file or the certificate file cannot be read, or the trunk would train
            otherwise than this run says.
    """
    # The stack ends in reverse order: the connection closes before the process stops.
    with contextlib.ExitStack() as stack:
        process: TrunkProcess | None = None
        token: str | TokenFile
        if config.trunk.address:
            token = coordinator_token(config.trunk.token_file, os.environ)
            address, certificates = config.trunk.address, config.trunk.root_certificates
            shown = ClientCertificate.of(config.trunk)
        else:
            logger.info("starting the trunk on loopback")
            process = TrunkProcess.start(config, config.join_timeout, checkpoints, ready)
            stack.callback(process.close)
            process.supervise()
            token, address, certificates = process.token, process.address, ""
            shown = NO_CERTIFICATE
        coordinator = TrunkCoordinator(
            address,
            token,
            root_certificates=certificates,
            timeout=_CONTROL_SECONDS,
            certificate=shown,
            proxy=config.trunk.proxy,
        )
        stack.callback(coordinator.close)
        status = coordinator.status()
        logger.info("the trunk serves on %s", address)
        fields = status.fingerprint
        if status.max_experiments > 1:
            check_settings(config, status, of_base=True)
            coordinator.bring(brought(config))
            stack.callback(_end_experiment, coordinator)
            fields = experiment_fingerprint(fields, config)
        else:
            check_settings(config, status)
        pem = _read_text(certificates, "trunk.root-certificates") if certificates else ""
        access = TrunkAccess(address=address, root_certificates=pem)
        health = _health_of(process, coordinator, config.join_timeout)
        if process is None:
            stack.enter_context(Heartbeat(coordinator))
        version = status.process.package_version
        yield ConnectedTrunk(coordinator, access, fields, health, version)


def _end_experiment(coordinator: TrunkCoordinator) -> None:
    """Give this run's place at a trunk of several experiments up, where the trunk still answers."""
    try:
        coordinator.end_experiment()
    except TrunkError as error:  # its lease ends
        logger.debug("the trunk was not told that this run is over: %s", error)


def check_settings(config: RunConfig, status: TrunkStatus, *, of_base: bool = False) -> None:
    """Check that a trunk trains as this run's configuration says: its record must be what happened.

    Cut layers are left out: clients may have their own, within the trunk's; each is checked.

    Args:
        config: The run's.
        status: As the trunk answered.
        of_base: Look only at what all experiments of a trunk share: the run brings the rest.

    Raises:
        ConfigError: They differ, in fields that are named with both values.
    """
    mine = {name: v for name, v in settings(config).items() if is_of_base(name) or not of_base}
    theirs = {name: value for name, value in status.fingerprint.items() if name in mine}
    version = status.process.package_version or "of another version"
    if problem := protocol_problem(
        mine,
        theirs,
        (f"this run (flower-split {__version__})", f"the trunk (flower-split {version})"),
    ):
        raise ConfigError(problem)
    if differing := differing_fields(mine, theirs, own_cuts=True):
        where = config.trunk.address or "that this run started"
        raise ConfigError(
            f"the trunk {where} (flower-split {version}; "
            f"here {__version__}) would not do what this run's configuration says: they differ in "
            f"{differences(mine, theirs, differing, labels=('run', 'trunk'))}. Start the trunk with the "
            "run's own configuration: flower-split trunk APP --run-config '…', or change the run's."
        )


def check_free(trunk: ConnectedTrunk, start: StartingPoint, retries: int) -> None:
    """Check, before any client is asked, that the trunk takes this run's rounds.

    Args:
        trunk: The trunk, connected.
        start: Where the run begins or goes on.
        retries: How often to ask again where the trunk restarts meanwhile (``round-retries``).

    Raises:
        TrunkRefused: It is at work on another experiment, or cannot restore the round to go on from.
        TrunkUnavailable: It does not answer.
    """
    server_round = start.base.server_round if start.base is not None else 0
    for left in range(retries, -1, -1):
        try:
            stand_at_base(trunk.coordinator, start, server_round)
            return
        except TrunkRefused as error:
            raise TrunkRefused(
                error.reason, f"the trunk at {trunk.access.address} does not take this run: {error}"
            ) from error
        except TrunkUnavailable:
            if left == 0:
                raise
            trunk.health.ensure_running()


def coordinator_token(path: str, environment: Mapping[str, str]) -> str | TokenFile:
    """Return what ``trunk.token-file`` names, read again when it changes; else the environment's.

    Args:
        path: The value of ``trunk.token-file``; empty: no file.
        environment: This process's environment.

    Raises:
        ConfigError: There is no token, its file cannot be read or is open to others, or it is too short.
    """
    key = "trunk.token-file"
    return TokenFile(path, key) if path else token_in(environment, key)


def _read_text(path: str, key: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key}: {path} cannot be read ({error}). Give a readable file."
        ) from error


def _health_of(
    process: TrunkProcess | None, coordinator: TrunkCoordinator, timeout: float
) -> TrunkHealth:
    """Return the health of a child, which its supervisor restarts, or of somebody else's trunk.

    Args:
        process: The child; None: somebody else runs the trunk, and restarts it.
        coordinator: Asks whether it serves.
        timeout: Seconds to wait until it serves again (``join-timeout``).
    """

    def is_running() -> bool:
        return process is None or not process.given_up

    def ensure_running() -> None:
        if not is_running():
            raise TrunkUnavailable("the trunk process ended, and could not be started again.")
        deadline = time.monotonic() + timeout
        while True:
            try:
                coordinator.status()  # waits up to its own deadline for an answer
                return
            except TrunkUnavailable:
                if time.monotonic() > deadline:
                    raise

    return TrunkHealth(is_running, ensure_running)
