"""The ServerApp: run directory, trunk, handshake, rounds, report, in this order and in one place.

Next: ``rounds.py``, the loop, and ``trunk_strategy.py``, the hooks that it calls.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from flower_split.aggregation.from_config import check_strategy
from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.messages.arrays import from_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.runs.beforehand import check_files
from flower_split.runs.loggers.registry import make_loggers
from flower_split.runs.loggers.run_loggers import logged
from flower_split.runs.manifest import FOLDER, Resumed, RunCheckpoints
from flower_split.runs.outcome import RoundOutcome
from flower_split.runtime import failpoints
from flower_split.runtime.flower_pulls import pull_sooner
from flower_split.runtime.log_fields import PROCESS_FIELDS
from flower_split.runtime.logs import log_to_stderr, quiet_libraries, shorten_flowers_errors
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.server.additions import Additions, EvaluateFn, RunCallback
from flower_split.server.asynchronous.loop import AsynchronousRounds, run_buffers
from flower_split.server.baseline import run_local_only
from flower_split.server.federation.client_keys import ClientKeys, key_notes
from flower_split.server.federation.data_notes import data_notes
from flower_split.server.federation.handshake import (
    SimulatedGrid,
    describe_clients,
    is_simulation,
    shake_hands,
    wait_for_nodes,
)
from flower_split.server.federation.version_notes import version_notes
from flower_split.server.federation.waiting import wait_for_clients
from flower_split.server.global_model import global_model, read_trunk_adapter
from flower_split.server.inner.fedbuff import FedBuff
from flower_split.server.inner.flower_strategies import InnerFactory, check_flower
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.packed_grid import PackedGrid
from flower_split.server.privacy.accounting import privacy_spent
from flower_split.server.privacy.mechanisms import check_privacy
from flower_split.server.recorder import Recorder
from flower_split.server.resuming import open_directory, resume_command, starting_point
from flower_split.server.rounds import RoundEnd, evaluate_clients, run_rounds
from flower_split.server.run_hooks import RunHooks
from flower_split.server.strategy_factory import RunParts, make_strategy, metric_sinks
from flower_split.server.traffic import MeteredGrid
from flower_split.server.trunk_connection import ConnectedTrunk, check_free, connect_trunk
from flower_split.server.trunk_strategy import TrunkStrategy
from flower_split.training.text_scores import check_libraries

logger = logging.getLogger(__name__)


def run(
    grid: Grid,
    config: RunConfig,
    inner: InnerFactory | None = None,
    additions: Additions = Additions(),
) -> Result:
    """Train, evaluate and report.

    Args:
        grid: Flower's grid.
        config: The run's configuration.
        inner: Makes the strategy inside; None: what ``strategy.*`` and ``privacy.*`` name.
        additions: The app's own evaluation and callbacks.

    Returns:
        Flower's history of the rounds that this process ran.

    Raises:
        FlowerSplitError: The run cannot start, or failed; one paragraph that names the remedy.
    """
    if inner is None:
        check_combinations(config)
    check_additions(config, additions)
    check_libraries(config.evaluation.names)
    loggers = make_loggers(config)
    check_files(config, simulated=is_simulation(grid))
    directory = open_directory(config)
    checkpoints = RunCheckpoints(directory.path / FOLDER)
    resumed = checkpoints.latest(previous=config.resume_previous) if config.resume else None
    recorder = Recorder(directory, config)
    recorder.forget_after(resumed.entry.server_round if resumed else 0)
    with logged(directory, loggers):
        return _run(grid, recorder, checkpoints, resumed, inner, additions)


def _run(
    grid: Grid,
    recorder: Recorder,
    checkpoints: RunCheckpoints,
    resumed: Resumed | None,
    inner: InnerFactory | None,
    additions: Additions,
) -> Result:
    """Run what is left of a run whose directory is ready."""
    config, directory = recorder.config, recorder.run
    done = resumed.entry.server_round if resumed else 0
    start = starting_point(directory, resumed.entry if resumed else None)
    nodes = wait_for_nodes(grid, config)
    ready = grid.trunk if isinstance(grid, SimulatedGrid) else None
    with connect_trunk(config, checkpoints.directory, ready) as trunk:
        if config.trunk.address:  # somebody else's, who may be at work for another run
            check_free(trunk, start, config.round_retries)
        federation, facts = shake_hands(grid, nodes, config, trunk.fingerprint)
        logger.info("%s", describe_clients(facts, federation))
        recorder.clients(facts)
        versions = version_notes(facts, trunk.package_version)
        _note(recorder, [*data_notes(federation, facts), *versions, *key_notes(facts)])
        client_keys = ClientKeys({slot: item.public_key for slot, item in facts.items()})
        trunk = _awaiting_clients(trunk, grid, config, client_keys)
        packing = [federation.nodes[slot] for slot, item in facts.items() if item.packs_arrays]
        grid = MeteredGrid(PackedGrid(grid, packing), recorder.traffic, federation.nodes)
        parts = RunParts(
            grid=grid,
            config=config,
            trunk=trunk,
            federation=federation,
            facts=facts,
            client_keys=client_keys,
            recorder=recorder,
            checkpoints=checkpoints,
            resumed=resumed,
            start=start,
        )
        strategy, arrays = make_strategy(parts, inner)
        hooks = RunHooks(additions, recorder, partial(global_model, parts, strategy))
        with resume_command(directory.path, strategy.inner):
            train(parts, strategy, hooks, arrays, done)
    with resume_command(directory.path, strategy.inner):
        report(parts, strategy)
    hooks.run_ended()
    return hooks.result


def _awaiting_clients(
    trunk: ConnectedTrunk, grid: Grid, config: RunConfig, client_keys: ClientKeys
) -> ConnectedTrunk:
    """Have lost clients waited for, but in a simulation, whose lost processes do not come back."""
    if is_simulation(grid):
        return trunk
    wait = partial(wait_for_clients, grid, seconds=config.join_timeout, answered=client_keys.learn)
    return replace(trunk, health=replace(trunk.health, await_clients=wait))


def _note(recorder: Recorder, notes: Sequence[str]) -> None:
    """Say in log and report what a reader must not miss."""
    for note in notes:
        logger.warning("%s", note)
        recorder.notes.append(note)


def check_combinations(config: RunConfig) -> None:
    """Check, before anything is started, that the strategy and privacy named can be combined.

    Raises:
        ConfigError: They cannot; names the remedy.
    """
    check_privacy(config)
    check = check_strategy if config.strategy.aggregates_lora else check_flower
    check(config.strategy)


def check_additions(config: RunConfig, additions: Additions) -> None:
    """Check that early stopping looks at something that is measured.

    Raises:
        ConfigError: It looks at what the app's evaluate_fn returns, and there is none.
    """
    if config.early_stopping.central_name and additions.evaluate_fn is None:
        raise ConfigError(
            f"early-stopping.metric is {config.early_stopping.metric!r}, but the app's ServerApp has no "
            "evaluate_fn. Make it with make_server_app(evaluate_fn=...), or look at eval-loss or "
            "train-loss."
        )


def train(
    parts: RunParts, strategy: TrunkStrategy, hooks: RunHooks, arrays: ArrayRecord, done: int
) -> None:
    """Run the rounds that are left, and write the final adapters.

    Args:
        parts: The run, connected.
        strategy: Its strategy.
        hooks: Called around its rounds.
        arrays: The global adapter after round ``done``.
        done: Committed rounds; 0 for a new run.

    Raises:
        FlowerSplitError: A round failed; the committed ones stay.
    """
    grid, recorder, health = parts.grid, parts.recorder, parts.trunk.health
    if not recorder.has_round(done):  # nor if the run was lost while it evaluated this round
        label = f"round {done}" if done else "before round 1"
        evaluated = evaluate_clients(strategy, grid, arrays, done, label, health)
        stop = hooks.ended(RoundEnd(done, arrays, None, evaluated))
        recorder.round_done(RoundOutcome(done, 0.0))
    else:
        stop = hooks.resumed(done)
    inner = strategy.inner
    if stop:
        strategy.last_round = done
    elif isinstance(inner, FedBuff):
        at_once, sinks = _at_once(parts.facts), metric_sinks(recorder)
        rounds = AsynchronousRounds(strategy, inner, grid, at_once=at_once, sinks=sinks)
        arrays = run_buffers(
            rounds,
            arrays,
            start_round=done + 1,
            on_round=recorder.round_done,
            health=health,
            hooks=hooks,
        )
    else:
        arrays = run_rounds(
            strategy,
            grid,
            arrays,
            start_round=done + 1,
            on_round=recorder.round_done,
            health=health,
            hooks=hooks,
        )
    recorder.last_round = strategy.last_round
    recorder.run.write_adapter("client", from_arrays(arrays))
    if isinstance(inner, LoraFedAvg) and inner.changes_base:
        recorder.run.write_adapter("base", inner.base_change())
    recorder.run.write_adapter("trunk", read_trunk_adapter(parts, strategy))


def report(parts: RunParts, strategy: TrunkStrategy) -> None:
    """Run the baseline that the report compares with, if one is asked for, and write the report.

    Raises:
        FederationError: A client failed in the baseline.
    """
    config, recorder = parts.config, parts.recorder
    if config.local_only_baseline:
        run_local_only(parts.grid, parts.federation, recorder)
    # A round that was tried again has been answered more than once.
    releases = strategy.last_round + strategy.trunk_rounds.attempt
    spent = privacy_spent(strategy.inner, config, releases)
    recorder.notes += spent.notes
    counts = {"clients": len(parts.federation.nodes), "server rounds": strategy.last_round}
    recorder.finish({**counts, **spent.facts})


def _at_once(facts: Mapping[int, ClientFacts]) -> int:
    """Return how many clients a simulation runs at once; 0: as many as there are."""
    return min((item.concurrency for item in facts.values() if item.concurrency > 0), default=0)


def make_server_app(
    inner: InnerFactory | None = None,
    *,
    evaluate_fn: EvaluateFn | None = None,
    callbacks: Sequence[RunCallback] = (),
) -> ServerApp:
    """Make a ServerApp, with a strategy of your own inside the trunk's coordination.

    The app that this package names in a run's ``pyproject.toml`` is ``make_server_app()``. For a
    strategy of your own, in an app's ``server_app.py``::

        from flower_split.server.app import make_server_app
        from flower_split.server.inner.flower_strategies import InnerContext

        def inner(context: InnerContext) -> Strategy:
            return FedAdam(eta=0.01, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

        app = make_server_app(inner)

    The ServerApp parses the run config, runs :func:`run`, and logs a failure in one paragraph before
    it raises it, so that ``flwr run`` ends with an error.

    Args:
        inner: Called once per run, after the handshake and before round 1, with the clients' initial
            adapter and the configuration; returns the strategy inside. See
            :data:`flower_split.server.inner.flower_strategies.InnerFactory`. None: the strategy that
            the run config's ``strategy.*`` and ``privacy.*`` name.
        evaluate_fn: Called before round 1 and after every round with the global adapters; returns
            metrics by name, or None.
        callbacks: Called around every round; each may end the run.
    """
    made = ServerApp()
    additions = Additions(evaluate_fn=evaluate_fn, callbacks=tuple(callbacks))

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        log_to_stderr()
        PROCESS_FIELDS.bind(run=context.run_id)
        shorten_flowers_errors()
        pull_sooner()
        quiet_libraries()
        PROCESS_TRACING.switch_on_from(os.environ, "flower-split-server")
        failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
        try:
            run(grid, parse_run_config(context.run_config), inner, additions)
        except FlowerSplitError as error:
            notes = getattr(error, "__notes__", [])  # the command that resumes the run
            logger.error("The run failed: %s", " ".join([str(error), *notes]))
            raise

    return made


app = make_server_app()
