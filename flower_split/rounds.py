"""The round loop: the four hooks of a strategy under one visible loop, with progress and deadlines.

Flower's own loop always begins at round 1, says nothing while a phase runs, and treats a round in
which every client failed as done. This one begins where it is told, reports where the trunk stands,
and ends a phase as soon as it cannot succeed any more.
"""

# ruff: noqa: TID251
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flower_split.errors import TrunkError
from flower_split.exchange import describe, exchange
from flower_split.strategy import TrunkStrategy
from flower_split.trunk.calls import TrunkStatus

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 2.0  # between two looks at the trunk
_GRACE_SECONDS = 20.0  # for the other clients' replies, once a phase cannot succeed any more


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What one round gave, for the caller's records."""

    server_round: int
    train: MetricRecord | None  # None for the evaluation before round 1
    evaluation: MetricRecord | None
    seconds: float


class PhaseWatch:
    """Looks after one phase while its clients work: progress lines, and an early end.

    Args:
        strategy: Whose phase is open.
        label: Begins every progress line, such as ``round 2/3``.
        trunk_alive: Whether the trunk process that this app started still runs.
    """

    def __init__(
        self, strategy: TrunkStrategy, label: str, trunk_alive: Callable[[], bool]
    ) -> None:
        self._strategy = strategy
        self._label = label
        self._trunk_alive = trunk_alive
        self._replies: list[Message] = []
        self._start = self._looked = time.monotonic()
        self._end = float("inf")
        self._shown = ""

    def __call__(self, new: Sequence[Message]) -> bool:
        """See :data:`flower_split.exchange.Watch`."""
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
        if not self._trunk_alive():
            if self._end == float("inf"):
                self._stop("the trunk process ended; its last log lines say why", now)
            return
        try:
            status = self._strategy.coordinator.status()
        except TrunkError as error:
            logger.warning("%s the trunk does not report its status: %s", self._label, error)
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
    trunk_alive: Callable[[], bool] = lambda: True,
) -> MetricRecord | None:
    """One evaluation phase; None where the run evaluates nothing."""
    messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
    replies = exchange(
        grid,
        messages,
        timeout=strategy.config.round_timeout,
        watch=PhaseWatch(strategy, label, trunk_alive),
    )
    return strategy.aggregate_evaluate(server_round, replies)


def run_rounds(
    strategy: TrunkStrategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    start_round: int = 1,
    on_round: Callable[[RoundOutcome], None],
    trunk_alive: Callable[[], bool] = lambda: True,
) -> ArrayRecord:
    """Run the rounds ``start_round … num-server-rounds``.

    Args:
        strategy: The strategy, with its trunk.
        grid: Flower's grid.
        arrays: The global adapter that ``start_round`` begins with.
        start_round: From 1; above 1 when a run is resumed.
        on_round: Called after every round.
        trunk_alive: Whether the trunk process that this app started still runs.

    Returns:
        The global adapter after the last round.

    Raises:
        FederationError: A phase failed; nothing of its round was kept.
        TrunkError: The trunk does not answer, or refuses a round.
    """
    last = strategy.config.num_server_rounds
    for server_round in range(start_round, last + 1):
        start, label = time.monotonic(), f"round {server_round}/{last}"
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        replies = exchange(
            grid,
            messages,
            timeout=strategy.config.round_timeout,
            watch=PhaseWatch(strategy, label, trunk_alive),
        )
        aggregated, train = strategy.aggregate_train(server_round, replies)
        arrays = arrays if aggregated is None else aggregated
        evaluation = evaluate_clients(strategy, grid, arrays, server_round, label, trunk_alive)
        seconds = time.monotonic() - start
        on_round(RoundOutcome(server_round, train, evaluation, seconds))
    return arrays
