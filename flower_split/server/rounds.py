"""The round loop: the four hooks of a strategy under one visible loop, with progress and deadlines.

Flower's own loop always begins at round 1, says nothing while a phase runs, and treats a round in
which every client failed as done. This one begins where it is told, reports where the trunk stands,
and ends a phase as soon as it can no longer succeed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flower_split.config import RunConfig
from flower_split.errors import RoundLost, TrunkUnavailable
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.federation.exchange import exchange
from flower_split.server.phase_watch import PhaseWatch
from flower_split.server.trunk_access import TrunkHealth
from flower_split.server.trunk_rounds import TrunkRounds
from flower_split.server.trunk_strategy import TrunkStrategy

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def with_retries(
    trunk_rounds: TrunkRounds,
    run: Callable[[], Value],
    label: str,
    *,
    retries: int,
    health: TrunkHealth,
) -> Value:
    """Return ``run()``; run it again under a new attempt where a process or a connection was lost.

    Args:
        trunk_rounds: The trunk's rounds; the lost one is aborted.
        run: One try.
        label: Names it in the log.
        retries: Tries after the first (``round-retries``).
        health: How the trunk process is watched.

    Raises:
        RoundLost: It was lost once more than ``retries``.
        FederationError: The round failed for another reason, or a client that was lost did not come
            back.
    """
    left = retries
    while True:
        try:
            return run()
        except (RoundLost, TrunkUnavailable) as error:
            trunk_rounds.abort(str(error))
            if left == 0:
                raise
            left -= 1
            # The trunk first: an attempt that begins on a dead one would be lost at once.
            health.ensure_running()
            if isinstance(error, RoundLost) and error.missing:
                health.await_clients(error.missing)
            attempt = trunk_rounds.new_attempt()
            logger.warning("%s begins again (attempt %d): %s", label, attempt, error)


def evaluate_clients(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    server_round: int,
    label: str,
    health: TrunkHealth = TrunkHealth(),
) -> MetricRecord | None:
    """Run one evaluation phase; return None where the run evaluates nothing.

    Raises:
        FederationError: Every client failed.
        TrunkError: The trunk does not answer, or refuses the round.
    """

    def run() -> MetricRecord | None:
        messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
        replies = _replies(strategy, grid, messages, label, health)
        return strategy.aggregate_evaluate(server_round, replies)

    return with_retries(
        strategy.trunk_rounds,
        run,
        f"{label} evaluation",
        retries=strategy.config.round_retries,
        health=health,
    )


def train_clients(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    server_round: int,
    label: str,
    health: TrunkHealth = TrunkHealth(),
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Run one training phase; return the new global adapter and the aggregated metrics.

    Raises:
        FederationError: Too few clients completed it; nothing of it was kept.
        TrunkError: The trunk does not answer, or refuses the round.
    """

    def run() -> tuple[ArrayRecord | None, MetricRecord | None]:
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        replies = _replies(strategy, grid, messages, label, health)
        return strategy.aggregate_train(server_round, replies)

    return with_retries(
        strategy.trunk_rounds, run, label, retries=strategy.config.round_retries, health=health
    )


def _replies(
    strategy: TrunkStrategy,
    grid: Grid,
    messages: Iterable[Message],
    label: str,
    health: TrunkHealth,
) -> list[Message]:
    """Send the messages of the open phase, and return the replies that came in time."""
    if strategy.phase is None:  # nothing to send
        return []
    watch = PhaseWatch(strategy.phase, strategy.trunk_rounds, health, label)
    return exchange(grid, messages, timeout=strategy.config.round_timeout, watch=watch)


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """A round that is committed, and evaluated where it is to be."""

    server_round: int  # 0: the evaluation before the first
    arrays: ArrayRecord  # the new global adapter
    trained: MetricRecord | None  # the inner strategy's aggregate
    evaluated: MetricRecord | None  # the same; None: no client evaluated


class RoundHooks:
    """What a round loop calls around its rounds, in its own thread; by default nothing happens."""

    def started(self, server_round: int) -> None:
        """Note that a round begins."""

    def ended(self, end: RoundEnd) -> str:
        """Note that a round has ended; return why the run stops, or nothing for it to go on."""
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLoop:
    """What both round loops, the synchronous and the asynchronous one, have around their rounds."""

    strategy: TrunkStrategy
    grid: Grid
    health: TrunkHealth
    on_round: Callable[[RoundOutcome], None]  # called after every round
    hooks: RoundHooks

    def numbers(self, start_round: int) -> Iterator[tuple[int, str]]:
        """Yield the rounds from ``start_round`` to the last, with what the log calls them."""
        last = self.strategy.config.num_server_rounds
        for server_round in range(start_round, last + 1):
            self.hooks.started(server_round)
            yield server_round, f"round {server_round}/{last}"

    def end(
        self, server_round: int, arrays: ArrayRecord, trained: MetricRecord | None, start: float
    ) -> bool:
        """Evaluate a committed round where it is to be, call the hooks, and record it.

        Args:
            server_round: The round.
            arrays: The new global adapter.
            trained: The inner strategy's metrics of the training.
            start: When the round began, on the monotonic clock.

        Returns:
            Whether the run stops after this round. Then everybody has evaluated it.

        Raises:
            FederationError: Every client failed to evaluate.
            TrunkError: The trunk does not answer, or refuses the round.
        """
        config, evaluated = self.strategy.config, None
        label = f"round {server_round}/{config.num_server_rounds}"
        if is_evaluated(config, server_round):
            evaluated = self._evaluate(server_round, arrays, label)
        why = self.hooks.ended(RoundEnd(server_round, arrays, trained, evaluated))
        if why and server_round < config.num_server_rounds:
            self.strategy.last_round = server_round
            if evaluated is None or config.fraction_evaluate < 1:
                self._evaluate(server_round, arrays, label)
        self.on_round(RoundOutcome(server_round, time.monotonic() - start))
        return bool(why)

    def _evaluate(self, server_round: int, arrays: ArrayRecord, label: str) -> MetricRecord | None:
        return evaluate_clients(self.strategy, self.grid, arrays, server_round, label, self.health)


def run_rounds(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    start_round: int = 1,
    on_round: Callable[[RoundOutcome], None],
    health: TrunkHealth = TrunkHealth(),
    hooks: RoundHooks = RoundHooks(),
) -> ArrayRecord:
    """Run the rounds ``start_round … num-server-rounds``, or until the hooks stop the run.

    Args:
        strategy: The strategy, with its trunk.
        grid: Flower's grid.
        arrays: The global adapter that ``start_round`` begins with.
        start_round: First round to run, from 1; above 1 when a run is resumed.
        on_round: Called after every round.
        health: How the trunk process is watched.
        hooks: Called around every round.

    Returns:
        The global adapter after the last round.

    Raises:
        FederationError: A phase failed; nothing of its round was kept.
        TrunkError: The trunk does not answer, or refuses a round.
    """
    loop = RoundLoop(strategy=strategy, grid=grid, health=health, on_round=on_round, hooks=hooks)
    for server_round, label in loop.numbers(start_round):
        start = time.monotonic()
        aggregated, trained = train_clients(strategy, grid, arrays, server_round, label, health)
        arrays = arrays if aggregated is None else aggregated
        if loop.end(server_round, arrays, trained, start):
            break
    return arrays


def is_evaluated(config: RunConfig, server_round: int) -> bool:
    """Return whether a round ends with an evaluation: every ``evaluate-every``-th, and the last."""
    return server_round % config.evaluate_every == 0 or server_round == config.num_server_rounds
