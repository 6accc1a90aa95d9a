"""The ServerApp: run directory, trunk, handshake, rounds, report, in this order and in one place."""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from flower_split.aggregation.from_config import check_strategy
from flower_split.config import RunConfig, parse_run_config, resolved_run_config
from flower_split.errors import (
    ConfigError,
    FlowerSplitError,
    RunDirectoryError,
    TrunkUnavailable,
)
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.parties.client_cuts import check_resumed
from flower_split.protocol.values import RoundBase, RoundReport
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import FOLDER, Resumed, RunCheckpoints
from flower_split.runs.private_factors import FOLDER as PRIVATE_FOLDER
from flower_split.runtime import failpoints
from flower_split.runtime.logs import log_to_stderr, quiet_libraries
from flower_split.server.asynchronous.loop import AsynchronousRounds, run_buffers
from flower_split.server.baseline import run_local_only
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.federation.exchange import Federation
from flower_split.server.federation.handshake import describe_clients, shake_hands, wait_for_nodes
from flower_split.server.inner.fedbuff import FedBuff
from flower_split.server.inner.flower_strategies import InnerFactory, check_flower
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.state import check_resumable, load_state, state_of
from flower_split.server.privacy.accounting import privacy_spent
from flower_split.server.privacy.mechanisms import check_privacy
from flower_split.server.recorder import Recorder
from flower_split.server.rounds import (
    RoundOutcome,
    TrunkCare,
    evaluate_clients,
    run_rounds,
    with_retries,
)
from flower_split.server.strategy_factory import inner_context, inner_strategy, largest_weights
from flower_split.server.trunk_process import TrunkProcess
from flower_split.server.trunk_strategy import TrunkAccess, TrunkStrategy

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
_CONTROL_SECONDS = 60.0  # deadline of one control call to the trunk


@dataclass(frozen=True, slots=True)
class ConnectedTrunk:
    """The trunk of this run, wherever it runs."""

    coordinator: TrunkCoordinator
    access: TrunkAccess
    fingerprint: Mapping[str, str]
    care: TrunkCare


def run(grid: Grid, config: RunConfig, inner: InnerFactory | None = None) -> None:
    """Train, evaluate and report.

    Args:
        grid: Flower's grid.
        config: The run's configuration.
        inner: Makes the strategy inside; None: what ``strategy.*`` and ``privacy.*`` name.

    Raises:
        FlowerSplitError: The run cannot start, or failed; one paragraph that names the remedy.
    """
    if inner is None:
        check_privacy(config)
        check = check_strategy if config.strategy.aggregates_lora else check_flower
        check(config.strategy)
    directory = open_directory(config)
    checkpoints = RunCheckpoints(directory.path / FOLDER)
    resumed = checkpoints.latest(previous=config.resume_previous) if config.resume else None
    done = resumed.entry.server_round if resumed else 0
    recorder = Recorder(directory, config)
    recorder.forget_after(done)
    nodes = wait_for_nodes(grid, config)
    with connect_trunk(config, checkpoints.directory) as trunk:
        federation, facts = shake_hands(grid, nodes, config, trunk.fingerprint)
        logger.info("%s", describe_clients(facts, federation))
        recorder.names = {slot: item.name for slot, item in facts.items()}
        strategy, arrays = make_strategy(
            grid, config, trunk, federation, facts, recorder, checkpoints, resumed, inner
        )
        if not recorder.has_round(done):  # nor if the run was lost while it evaluated this round
            label = f"round {done}" if done else "before round 1"
            evaluation = evaluate_clients(strategy, grid, arrays, done, label, trunk.care)
            recorder.round_done(RoundOutcome(done, None, evaluation, 0.0))
        if isinstance(strategy.inner, FedBuff):
            arrays = run_buffers(
                AsynchronousRounds(
                    strategy,
                    strategy.inner,
                    grid,
                    at_once=_at_once(facts),
                    on_steps=recorder.steps,
                    on_arrivals=recorder.arrivals,
                ),
                arrays,
                start_round=done + 1,
                on_round=recorder.round_done,
                trunk=trunk.care,
            )
        else:
            arrays = run_rounds(
                strategy,
                grid,
                arrays,
                start_round=done + 1,
                on_round=recorder.round_done,
                trunk=trunk.care,
            )
        directory.write_adapter("client", from_arrays(arrays))
        if isinstance(strategy.inner, LoraFedAvg) and strategy.inner.changes_base:
            directory.write_adapter("base", strategy.inner.base_change())
        directory.write_adapter("trunk", final_trunk_adapter(strategy, trunk))
    if config.local_only_baseline:
        run_local_only(grid, federation, recorder)
    # A round that was tried again has been answered more than once.
    spent = privacy_spent(strategy.inner, config, config.num_server_rounds + strategy.attempt)
    recorder.notes += spent.notes
    counts = {"clients": len(federation.nodes), "server rounds": config.num_server_rounds}
    recorder.finish({**counts, **spent.facts})


def make_strategy(
    grid: Grid,
    config: RunConfig,
    trunk: ConnectedTrunk,
    federation: Federation,
    facts: Mapping[int, ClientFacts],
    recorder: Recorder,
    checkpoints: RunCheckpoints,
    resumed: Resumed | None,
    make_inner: InnerFactory | None = None,
) -> tuple[TrunkStrategy, ArrayRecord]:
    """The run's strategy and the adapter it begins with; both go on from ``resumed``."""
    context = inner_context(grid, config, federation, facts)
    inner, notes = inner_strategy(context, facts, federation, make_inner)
    for note in notes:
        logger.warning("%s", note)
        recorder.notes.append(note)
    arrays, base, attempt = to_arrays(context.initial), RoundBase(0), 0
    if isinstance(inner, LoraFedAvg):
        arrays = inner.initial_arrays()
        inner.private_folder = str(recorder.run.path / PRIVATE_FOLDER)
    experiment = recorder.run.path.name + "-" + secrets.token_hex(4)
    if resumed is not None:
        entry = resumed.entry
        check_resumed(resumed.adapter, context.initial)
        check_resumable(inner)
        load_state(inner, resumed.strategy)
        arrays, base = to_arrays(resumed.adapter), RoundBase(entry.server_round, entry.trunk_digest)
        experiment, attempt = entry.experiment, entry.attempt + 1
        logger.info("going on after round %d of experiment %s", entry.server_round, experiment)

    def commit(server_round: int, report: RoundReport, adapter: ArrayRecord) -> None:
        if server_round:
            recorder.trunk_round(server_round, strategy.attempt, report)
            if isinstance(inner, LoraFedAvg):
                recorder.aggregation(server_round, inner.last_summary)
        checkpoints.commit(
            experiment=experiment,
            server_round=server_round,
            attempt=strategy.attempt,
            trunk_digest=report.digest if server_round else "",
            trunk_version=report.version,
            adapter=from_arrays(adapter),
            strategy=state_of(inner),
        )

    strategy = TrunkStrategy(
        inner,
        trunk.coordinator,
        federation,
        config,
        access=trunk.access,
        experiment=experiment,
        steps_per_round=max(item.planned_steps for item in facts.values()),
        attempt=attempt,
        base=base,
        on_commit=commit,
        on_steps=recorder.steps,
        on_evaluation=recorder.evaluation,
    )
    strategy.largest_weights = largest_weights(config, facts)
    strategy.summary()
    if resumed is None:
        nothing = RoundReport(
            version=0, digest="", slots=(), optimizer_steps=0, compute_seconds=0.0
        )
        commit(0, nothing, arrays)
    return strategy, arrays


def _at_once(facts: Mapping[int, ClientFacts]) -> int:
    """How many clients a simulation runs at once; 0: as many as there are."""
    return min((item.concurrency for item in facts.values() if item.concurrency > 0), default=0)


def open_directory(config: RunConfig) -> RunDirectory:
    """A new run's directory, or that of the run to go on with.

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


def final_trunk_adapter(strategy: TrunkStrategy, trunk: ConnectedTrunk) -> dict[str, Tensor]:
    """The trunk's adapter after the last round, whatever happened to its process since."""

    def fetch() -> dict[str, Tensor]:
        epoch = strategy.settle_trunk(strategy.config.num_server_rounds)
        adapter = trunk.coordinator.get_adapter()
        if trunk.coordinator.status().epoch != epoch:  # a new process has the initial weights
            raise TrunkUnavailable("the trunk restarted while its adapter was read.")
        return adapter

    return with_retries(strategy, fetch, "the trunk's adapter", trunk.care)


@contextlib.contextmanager
def connect_trunk(config: RunConfig, checkpoints: Path) -> Iterator[ConnectedTrunk]:
    """Start a trunk on loopback, or reach the one that ``trunk.address`` names.

    Args:
        config: The run's configuration.
        checkpoints: Where a trunk that is started here keeps its rounds.

    Raises:
        TrunkUnavailable: It does not start, or does not answer.
        ConfigError: The token file or the certificate file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if config.trunk.address:
            token = read_token(config.trunk.token_file)
            address, certificates = config.trunk.address, config.trunk.root_certificates
            process = None
        else:
            logger.info("starting the trunk on loopback")
            process = stack.enter_context(
                TrunkProcess.start(config, config.join_timeout, checkpoints)
            )
            process.supervise()
            token, address, certificates = process.token, process.address, ""
        coordinator = TrunkCoordinator(
            address, token, root_certificates=certificates, timeout=_CONTROL_SECONDS
        )
        stack.callback(coordinator.close)
        status = coordinator.status()
        logger.info("the trunk serves on %s", address)
        pem = _read_text(certificates, "trunk.root-certificates") if certificates else ""
        access = TrunkAccess(address=address, root_certificates=pem)
        care = _care_of(process, coordinator, config.join_timeout)
        yield ConnectedTrunk(coordinator, access, status.fingerprint, care)


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


def _care_of(
    process: TrunkProcess | None, coordinator: TrunkCoordinator, timeout: float
) -> TrunkCare:
    """A child is started again by its supervisor; for a trunk of somebody else's we wait."""

    def alive() -> bool:
        return process is None or not process.given_up

    def revive() -> None:
        if not alive():
            raise TrunkUnavailable("the trunk process ended, and could not be started again.")
        deadline = time.monotonic() + timeout
        while True:
            try:
                coordinator.status()
                return
            except TrunkUnavailable:
                if time.monotonic() > deadline:
                    raise

    return TrunkCare(alive, revive)


def make_server_app(inner: InnerFactory | None = None) -> ServerApp:
    """The ServerApp, with a strategy of your own inside the trunk's coordination.

    For example, in an app's ``server_app.py``::

        def inner(context: InnerContext) -> Strategy:
            return FedAdam(eta=0.01, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

        app = make_server_app(inner)

    Args:
        inner: See :data:`flower_split.server.inner.flower_strategies.InnerFactory`; None: what the
            run config's ``strategy.*`` and ``privacy.*`` name.
    """
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        log_to_stderr()
        quiet_libraries()
        failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
        try:
            run(grid, parse_run_config(context.run_config), inner)
        except FlowerSplitError as error:
            logger.error("The run failed: %s", error)
            raise

    return made


app = make_server_app()
