"""The asynchronous round loop: clients are sent out one by one, and every K arrivals are a round.

FedBuff (:mod:`flower_split.server.inner.fedbuff`, with the paper) from the ServerApp's side. At most
``strategy.concurrency`` clients are at work at a time. Whoever comes back is replaced at once by an idle
client, first by one that has not yet been sent out with the current version, chosen by the seed. A new
client gets the adapter of the last committed round, and its dispatch is named to the trunk, which keeps
that version of its own weights for it (:mod:`flower_split.trunk.engine.dispatches`).

A round is a buffer of ``strategy.buffer-size`` arrivals, in the order in which they came, and is committed
in two phases like any round: the trunk steps with the arrivals' gradients and prepares; the adapters are
aggregated; the manifest is renamed; the trunk commits. One clock of versions serves both sides: version
``r`` is what round ``r`` committed.

- An arrival more than ``strategy.max-staleness`` versions behind is dropped and named; a client that is
  still at work then is recalled, so that the trunk keeps at most that many old versions.
- ``strategy.max-staleness = 0``: nobody is sent out beyond what the open buffer takes. Every round is then
  one of K clients that begin alike: synchronous FedAvg, with the same numbers.
- A client that fails or is silent until ``round-timeout`` is sent out again, with the same data; after
  ``round-retries`` failures in a row it is left out of the run and named, and if the quorum is broken
  (``trunk.quorum`` of all clients) the run ends.
- A crash, of the trunk or of this process, loses what is not committed and no more: the clients are sent
  out again from the last committed round.
- Evaluations ask clients that are at work too, and wait for them: give ``fraction-evaluate = 0`` or a
  small share to let clients work without pause.

The order of arrivals depends on time, so two runs differ; ``metrics.jsonl`` records it (kind "arrival").
The same arrivals give the same bits, in whatever order they came.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from flower_split.errors import FederationError, RoundLost, TrunkError
from flower_split.messages.replies import scalars, take_steps
from flower_split.protocol.values import Arrival
from flower_split.runs.outcome import RoundOutcome
from flower_split.runtime import failpoints
from flower_split.server.asynchronous.arrivals import Arrivals
from flower_split.server.asynchronous.dispatcher import Dispatcher
from flower_split.server.inner.fedbuff import ClientArrival, FedBuff
from flower_split.server.inner.state import load_state, state_of
from flower_split.server.metric_sinks import MetricSinks
from flower_split.server.rounds import RoundHooks, RoundLoop, with_retries
from flower_split.server.trunk_access import TrunkHealth
from flower_split.server.trunk_strategy import TrunkStrategy

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 2.0  # between two polls of the trunk's status
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between two polls for replies


class AsynchronousRounds:
    """Send clients out, collect them, and close rounds.

    Args:
        strategy: The run's strategy around ``inner``; its trunk rounds are used.
        inner: The adapters' side.
        grid: Flower's grid.
        at_once: Clients that can run at a time, such as in a simulation; 0: any number.
        sinks: Where the clients' metrics and the order of their arrivals go.

    Raises:
        FederationError: ``strategy.concurrency`` is larger than the number of clients.
    """

    def __init__(
        self,
        strategy: TrunkStrategy,
        inner: FedBuff,
        grid: Grid,
        *,
        at_once: int = 0,
        sinks: MetricSinks = MetricSinks(),
    ) -> None:
        self.strategy = strategy
        self.grid = grid
        self._inner = inner
        self._config = strategy.config
        self._trunk_rounds = strategy.trunk_rounds
        self._sinks = sinks
        self._arrivals = Arrivals(
            inner,
            strategy.federation,
            size=strategy.config.strategy.buffer_size,
            max_staleness=strategy.config.strategy.max_staleness,
        )
        concurrency = _concurrency(strategy, at_once)
        self._dispatcher = Dispatcher(
            strategy, inner, grid, self._arrivals, concurrency=concurrency
        )
        self._polled = time.monotonic()
        logger.info(
            "fedbuff: %d clients at work at a time, %d arrivals make a round, at most %d versions late",
            concurrency,
            self._arrivals.size,
            self._arrivals.max_staleness,
        )

    @property
    def num_at_work(self) -> int:
        """Return how many clients are at work."""
        return self._dispatcher.num_open

    def run(
        self, server_round: int, arrays: ArrayRecord, health: TrunkHealth
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run one round: fill the buffer, step, commit.

        Args:
            server_round: Number of the round, from 1.
            arrays: The global adapter of the round before.
            health: How the trunk process is watched.

        Returns:
            The new global adapter, and the clients' metrics.

        Raises:
            RoundLost: The trunk or its round was lost; whoever was at work is forgotten.
            FederationError: Too many clients have failed, or the round cannot be closed.
            TrunkError: The trunk does not answer, or refuses the round.
        """
        try:
            self._fill(server_round, arrays, health)
            return self._close(server_round)
        except BaseException as error:  # also an interrupt: the trunk must not wait for it
            self._dispatcher.forget()
            self._arrivals.forget()
            self._trunk_rounds.abort(f"the ServerApp could not finish the round: {error}")
            raise

    def dismiss(self) -> None:
        """End the work of all clients that are still out: the run needs nobody any more."""
        if not self._dispatcher.num_open and not self._arrivals.waiting:
            return
        self._dispatcher.forget_open()
        self._arrivals.forget_waiting()
        try:
            # A round that names no dispatch refuses those of the clients at work at their next call.
            self._trunk_rounds.begin_buffer(self._config.num_server_rounds + 1, ())
        except TrunkError as error:
            logger.warning("could not cancel the clients that are still training: %s", error)
        self._dispatcher.forget()
        self._arrivals.forget()
        self._trunk_rounds.abort("the run's last round is committed")

    # ------------------------------------------------------------------ filling the buffer

    def _fill(self, server_round: int, arrays: ArrayRecord, health: TrunkHealth) -> None:
        """Send clients out and collect them until the round has its arrivals."""
        dispatcher, arrivals = self._dispatcher, self._arrivals
        dispatcher.recall_stale(server_round)
        arrivals.take(server_round)
        dispatcher.send(server_round, arrays)
        pause = _FIRST_PAUSE
        while not arrivals.full:
            came = dispatcher.collect(server_round)
            dispatcher.expire()
            if keyless := dispatcher.take_keyless():
                health.await_clients(keyless)  # each answers at once, with its new key
            arrivals.take(server_round)
            if not arrivals.full and dispatcher.choose(server_round):
                dispatcher.send(server_round, arrays)
            if time.monotonic() - self._polled >= _STATUS_SECONDS:
                self._polled = time.monotonic()
                self._poll(server_round, health)
            pause = _FIRST_PAUSE if came else min(pause * 1.5, _LONGEST_PAUSE)
            if not came:
                time.sleep(pause)

    def _poll(self, server_round: int, health: TrunkHealth) -> None:
        """Read the trunk's status, and log where the round stands.

        Raises:
            RoundLost: Its process has ended or has been started again, or the round was given up.
        """
        if not health.is_running():
            raise RoundLost("the trunk process ended; its last log lines say why")
        try:
            status = self._trunk_rounds.status()
        except TrunkError as error:
            logger.warning("the trunk does not report its status: %s", error)
            return
        if status.epoch != self._dispatcher.epoch:
            raise RoundLost(f"round {server_round}: the trunk has restarted.")
        if status.phase == "aborted":
            raise RoundLost(f"round {server_round}: the trunk gave it up: {status.problem}")
        self._dispatcher.leave_out(status.revoked)
        logger.info(
            "round %d/%d %d of %d arrived, %d at work, %.1f MB of theirs",
            server_round,
            self._config.num_server_rounds,
            len(self._arrivals.pending),
            self._arrivals.size,
            self._dispatcher.num_open,
            (status.bytes_received + status.bytes_sent) / 1e6,
        )

    # ------------------------------------------------------------------ closing the round

    def _close(self, server_round: int) -> tuple[ArrayRecord, MetricRecord]:
        """Step on both sides with the buffer, and commit."""
        buffer, before = self._arrivals.buffer, state_of(self._inner)
        report = self._trunk_rounds.prepare(
            server_round,
            [
                Arrival(item.dispatch.number, self._inner.staleness(item.staleness(server_round)))
                for item in buffer
            ],
        )
        failpoints.reach("server.aggregate.before")
        try:
            arrays, metrics = self._aggregate(server_round, buffer)
            self._sinks.arrivals(server_round, self._arrivals.records(server_round))
            self._trunk_rounds.commit(server_round, report, arrays)
        except BaseException:
            load_state(self._inner, before)
            raise
        self._arrivals.committed()
        return arrays, metrics

    def _aggregate(
        self, server_round: int, buffer: Sequence[ClientArrival]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Aggregate the arrivals' adapters; their step metrics go to the sink."""
        plain = []
        for arrival in buffer:
            content, steps = take_steps(arrival.content)
            numbers = scalars(arrival.content)
            self._sinks.steps(server_round, arrival.dispatch.slot, steps, numbers)
            plain.append(replace(arrival, content=content))
        return self._inner.aggregate_arrivals(server_round, plain)


def _concurrency(strategy: TrunkStrategy, at_once: int) -> int:
    """Return how many clients work at a time: ``strategy.concurrency``, as far as it can be had.

    Raises:
        FederationError: More are configured than there are.
    """
    total, wanted = len(strategy.federation.partition_ids), strategy.config.strategy.concurrency
    if wanted > total:
        raise FederationError(
            f"strategy.concurrency is {wanted}, but the run has {total} clients. Lower it, or 0: all."
        )
    wanted = wanted or total
    if 0 < at_once < wanted:
        logger.warning(
            "this simulation runs %d clients at once, so strategy.concurrency is %d instead of %d",
            at_once,
            at_once,
            wanted,
        )
        return at_once
    return wanted


def run_buffers(
    rounds: AsynchronousRounds,
    arrays: ArrayRecord,
    *,
    start_round: int = 1,
    on_round: Callable[[RoundOutcome], None],
    health: TrunkHealth,
    hooks: RoundHooks = RoundHooks(),
) -> ArrayRecord:
    """Run the asynchronous rounds ``start_round … num-server-rounds``, or until the hooks stop the run.

    Args:
        rounds: Sends clients out and closes rounds.
        arrays: The global adapter that ``start_round`` begins with.
        start_round: First round to run, from 1; above 1 when a run is resumed.
        on_round: Called after every round.
        health: How the trunk process is watched.
        hooks: Called around every round.

    Returns:
        The global adapter after the last round.

    Raises:
        FederationError: Too many clients failed; nothing of the open round was kept.
        TrunkError: The trunk does not answer, or refuses a round.
    """
    strategy = rounds.strategy
    loop = RoundLoop(
        strategy=strategy, grid=rounds.grid, health=health, on_round=on_round, hooks=hooks
    )
    for server_round, label in loop.numbers(start_round):
        start = time.monotonic()
        arrays, trained = with_retries(
            strategy.trunk_rounds,
            partial(rounds.run, server_round, arrays, health),
            label,
            retries=strategy.config.round_retries,
            health=health,
        )
        if server_round == strategy.config.num_server_rounds:
            rounds.dismiss()
        if loop.end(server_round, arrays, trained, start):
            rounds.dismiss()
            break
    return arrays
