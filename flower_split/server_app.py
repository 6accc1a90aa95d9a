"""The ServerApp: run directory, trunk, handshake, rounds, report, in this order and in one place."""

# ruff: noqa: TID251
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flower_split.arrays import from_arrays
from flower_split.assets import resolve_model_path
from flower_split.baseline import run_local_only
from flower_split.config import RunConfig, parse_run_config
from flower_split.coordinator import TrunkCoordinator
from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.exchange import Federation
from flower_split.facts import ClientFacts
from flower_split.handshake import describe_clients, shake_hands, wait_for_nodes
from flower_split.logs import log_to_stderr, quiet_libraries
from flower_split.lora import initial_client_adapter
from flower_split.lora_fedavg import LoraFedAvg
from flower_split.parts import client_parts, model_cuts
from flower_split.recorder import Recorder
from flower_split.report import RunDirectory
from flower_split.rounds import RoundOutcome, evaluate_clients, run_rounds
from flower_split.strategy import TrunkAccess, TrunkStrategy
from flower_split.trunk.child import TrunkProcess

logger = logging.getLogger(__name__)

_CONTROL_SECONDS = 60.0  # deadline of one control call to the trunk

app = ServerApp()


@dataclass(frozen=True, slots=True)
class ConnectedTrunk:
    """The trunk of this run, wherever it runs."""

    coordinator: TrunkCoordinator
    access: TrunkAccess
    fingerprint: Mapping[str, str]
    alive: Callable[[], bool]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the whole job; see :func:`run`."""
    log_to_stderr()
    quiet_libraries()
    try:
        run(grid, parse_run_config(context.run_config))
    except FlowerSplitError as error:
        logger.error("The run failed: %s", error)
        raise


def run(grid: Grid, config: RunConfig) -> None:
    """Train, evaluate and report.

    Args:
        grid: Flower's grid.
        config: The run's configuration.

    Raises:
        FlowerSplitError: The run cannot start, or failed; one paragraph that names the remedy.
    """
    directory = RunDirectory.create(config)
    logger.info("run directory: %s", directory.path)
    recorder = Recorder(directory, config)
    nodes = wait_for_nodes(grid, config)
    with connect_trunk(config) as trunk:
        federation, facts = shake_hands(grid, nodes, config, trunk.fingerprint)
        logger.info("%s", describe_clients(facts, federation))
        recorder.names = {slot: item.name for slot, item in facts.items()}
        strategy, arrays = make_strategy(config, trunk, federation, facts, recorder)
        initial = evaluate_clients(strategy, grid, arrays, 0, "before round 1", trunk.alive)
        recorder.round_done(RoundOutcome(0, None, initial, 0.0))
        arrays = run_rounds(
            strategy, grid, arrays, on_round=recorder.round_done, trunk_alive=trunk.alive
        )
        directory.write_adapter("client", from_arrays(arrays))
        directory.write_adapter("trunk", trunk.coordinator.get_adapter())
    if config.local_only_baseline:
        run_local_only(grid, federation, recorder)
    recorder.finish({"clients": len(federation.nodes), "server rounds": config.num_server_rounds})


def make_strategy(
    config: RunConfig,
    trunk: ConnectedTrunk,
    federation: Federation,
    facts: Mapping[int, ClientFacts],
    recorder: Recorder,
) -> tuple[TrunkStrategy, ArrayRecord]:
    """The run's strategy and the adapter it begins with."""
    state, scales = initial_client_adapter(
        resolve_model_path(config.model.name),
        model_cuts(config),
        client_parts(config),
        seed=config.seed,
        dtype=config.model.dtype,
        revision=config.model.revision or None,
        attn_implementation=config.model.attn_implementation or None,
    )
    inner = LoraFedAvg(config.strategy, scales, state, federation.slot_of)
    strategy = TrunkStrategy(
        inner,
        trunk.coordinator,
        federation,
        config,
        access=trunk.access,
        experiment=recorder.run.path.name + "-" + secrets.token_hex(4),
        steps_per_round=max(item.planned_steps for item in facts.values()),
        on_steps=recorder.steps,
        on_evaluation=recorder.evaluation,
    )
    strategy.summary()
    return strategy, inner.initial_arrays()


@contextlib.contextmanager
def connect_trunk(config: RunConfig) -> Iterator[ConnectedTrunk]:
    """Start a trunk on loopback, or reach the one that ``trunk.address`` names.

    Raises:
        TrunkUnavailable: It does not start, or does not answer.
        ConfigError: The token file or the certificate file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if config.trunk.address:
            token = read_token(config.trunk.token_file)
            address, certificates = config.trunk.address, config.trunk.root_certificates
            alive = _always
        else:
            logger.info("starting the trunk on loopback")
            process = stack.enter_context(TrunkProcess.start(config, config.join_timeout))
            token, address, certificates = process.token, process.address, ""
            alive = _alive_of(process)
        coordinator = TrunkCoordinator(
            address, token, root_certificates=certificates, timeout=_CONTROL_SECONDS
        )
        stack.callback(coordinator.close)
        status = coordinator.status()
        logger.info("the trunk serves on %s", address)
        pem = _read_text(certificates, "trunk.root-certificates") if certificates else ""
        access = TrunkAccess(address=address, root_certificates=pem)
        yield ConnectedTrunk(coordinator, access, status.fingerprint, alive)


def read_token(path: str) -> str:
    """The coordinator's token from ``trunk.token-file``.

    Raises:
        ConfigError: No file is named, or it cannot be read, or it is empty.
    """
    if not path:
        raise ConfigError(
            "trunk.address names a running trunk, but trunk.token-file is empty. Name the file "
            "that the trunk was started with: flower-split trunk … --token-file FILE."
        )
    token = _read_text(path, "trunk.token-file").strip()
    if not token:
        raise ConfigError(f"trunk.token-file {path} is empty; it must hold the trunk's token.")
    return token


def _read_text(path: str, key: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key}: {path} cannot be read ({error}). Give a readable file."
        ) from error


def _always() -> bool:
    return True


def _alive_of(process: TrunkProcess) -> Callable[[], bool]:
    return lambda: process.alive
