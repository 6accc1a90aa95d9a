"""The round loop: the four hooks of a strategy under one visible loop, with progress and deadlines.

Flower's own loop always begins at round 1, says nothing while a phase runs, and treats a round in
which every client failed as done. This one begins where it is told, reports where the trunk stands,
and ends a phase as soon as it cannot succeed any more.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flower_split.errors import RoundLost, TrunkError, TrunkUnavailable
from flower_split.protocol.values import TrunkStatus
from flower_split.server.federation.exchange import describe, exchange
from flower_split.server.trunk_strategy import TrunkStrategy

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_STATUS_SECONDS = 2.0  # between two looks at the trunk
_GRACE_SECONDS = 20.0  # for the other clients' replies, once a phase cannot succeed any more


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What one round gave, for the caller's records."""

    server_round: int
    train: MetricRecord | None  # None for the evaluation before round 1
    evaluation: MetricRecord | None
    seconds: float


@dataclass(frozen=True, slots=True)
class TrunkCare:
    """How the round loop looks after the trunk's process."""

    alive: Callable[[], bool] = lambda: True
    """Whether the process that this app started still runs; True where another one did."""
    revive: Callable[[], None] = lambda: None
    """Make the trunk serve again, or wait until it does.

    Raises:
        TrunkUnavailable: It does not.
    """


def with_retries(
    strategy: TrunkStrategy, run: Callable[[], Value], label: str, trunk: TrunkCare
) -> Value:
    """``run()``, again under a new attempt where a process or a connection was lost.

    Raises:
        RoundLost: It was lost once more than ``round-retries``.
        FederationError: The round failed for another reason.
    """
    left = strategy.config.round_retries
    while True:
        try:
            return run()
        except (RoundLost, TrunkUnavailable) as error:
            strategy.give_up(str(error))
            if left == 0:
                raise
            left -= 1
            trunk.revive()
            strategy.attempt += 1
            logger.warning("%s begins again (attempt %d): %s", label, strategy.attempt, error)


class PhaseWatch:
    """Looks after one phase while its clients work: progress lines, and an early end.

    Args:
        strategy: Whose phase is open.
        label: Begins every progress line, such as ``round 2/3``.
        trunk: How the trunk process is looked after.
    """

    def __init__(self, strategy: TrunkStrategy, label: str, trunk: TrunkCare) -> None:
        self._strategy = strategy
        self._label = label
        self._trunk = trunk
        self._replies: list[Message] = []
        self._start = self._looked = time.monotonic()
        self._end = float("inf")
        self._shown = ""

    def __call__(self, new: Sequence[Message]) -> bool:
        """See :data:`flower_split.server.federation.exchange.Watch`."""
        self._replies += new
        now = time.monotonic()
        if new and self._end == float("inf"):
            self._check_failures(now)
        if now - self._looked >= _STATUS_SECONDS:
            self._looked = now
            self._look(now)
        return now >= self._end

    def _check_failures(self, now: float) -> None:
        strategy = self._strategy
        failed = strategy.failures(self._replies)
        if failed and len(strategy.participants) - len(failed) < strategy.required:
            self._stop(describe(failed, strategy.federation), now)

    def _look(self, now: float) -> None:
        if not self._trunk.alive():
            # Serving again at once, it tells the clients that wait for it that their round is over.
            self._lose("the trunk process ended; its last log lines say why", now)
            self._trunk.revive()
            return
        try:
            status = self._strategy.coordinator.status()
        except TrunkError as error:
            logger.warning("%s the trunk does not report its status: %s", self._label, error)
            return
        if status.epoch != self._strategy.epoch and self._end == float("inf"):
            self._lose("the trunk restarted", now)
            return
        if status.phase == "aborted" and self._end == float("inf"):
            self._stop(f"the trunk gave the round up: {status.problem}", now)
            return
        line = self._progress(status, now)
        if line != self._shown:
            self._shown = line
            logger.info("%s", line)

    def _progress(self, status: TrunkStatus, now: float) -> str:
        megabytes = (status.bytes_received + status.bytes_sent) / 1e6
        if self._strategy.evaluating:
            done = f"{len(self._replies)} of {len(self._strategy.participants)} clients"
            return f"{self._label} evaluating: {done} done, {megabytes:.1f} MB"
        if status.phase == "joining":
            return f"{self._label} clients are joining"
        rate = status.num_tokens / max(now - self._start, 1e-9)
        steps = self._strategy.steps_per_round
        return (
            f"{self._label} step {min(status.window, steps)}/{steps} "
            f"{rate:.0f} tokens/s {megabytes:.1f} MB"
        )

    def _lose(self, why: str, now: float) -> None:
        """The trunk that the phase ran on is no more: whoever has not answered has lost it."""
        if self._end == float("inf"):
            logger.warning("%s: %s", self._label, why)
            self._strategy.lose_phase(why)
            self._end = now + _GRACE_SECONDS

    def _stop(self, why: str, now: float) -> None:
        logger.warning("%s cannot succeed any more: %s", self._label, why)
        self._strategy.stop_phase(why)
        self._end = now + _GRACE_SECONDS


def evaluate_clients(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    server_round: int,
    label: str,
    trunk: TrunkCare = TrunkCare(),
) -> MetricRecord | None:
    """One evaluation phase; None where the run evaluates nothing."""

    def run() -> MetricRecord | None:
        messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
        timeout, watch = strategy.config.round_timeout, PhaseWatch(strategy, label, trunk)
        replies = exchange(grid, messages, timeout=timeout, watch=watch)
        return strategy.aggregate_evaluate(server_round, replies)

    return with_retries(strategy, run, f"{label} evaluation", trunk)


def train_clients(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    server_round: int,
    label: str,
    trunk: TrunkCare = TrunkCare(),
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """One training phase."""

    def run() -> tuple[ArrayRecord | None, MetricRecord | None]:
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        timeout, watch = strategy.config.round_timeout, PhaseWatch(strategy, label, trunk)
        replies = exchange(grid, messages, timeout=timeout, watch=watch)
        return strategy.aggregate_train(server_round, replies)

    return with_retries(strategy, run, label, trunk)


def run_rounds(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    start_round: int = 1,
    on_round: Callable[[RoundOutcome], None],
    trunk: TrunkCare = TrunkCare(),
) -> ArrayRecord:
    """Run the rounds ``start_round … num-server-rounds``.

    Args:
        strategy: The strategy, with its trunk.
        grid: Flower's grid.
        arrays: The global adapter that ``start_round`` begins with.
        start_round: From 1; above 1 when a run is resumed.
        on_round: Called after every round.
        trunk: How the trunk process is looked after.

    Returns:
        The global adapter after the last round.

    Raises:
        FederationError: A phase failed; nothing of its round was kept.
        TrunkError: The trunk does not answer, or refuses a round.
    """
    last = strategy.config.num_server_rounds
    for server_round in range(start_round, last + 1):
        start, label = time.monotonic(), f"round {server_round}/{last}"
        aggregated, train = train_clients(strategy, grid, arrays, server_round, label, trunk)
        arrays = arrays if aggregated is None else aggregated
        evaluation = evaluate_clients(strategy, grid, arrays, server_round, label, trunk)
        seconds = time.monotonic() - start
        on_round(RoundOutcome(server_round, train, evaluation, seconds))
    return arrays
