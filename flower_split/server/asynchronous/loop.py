"""The asynchronous round loop: clients are sent out one by one, and every K that come back are a round.

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
import math
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from flower_split.errors import (
    FederationError,
    FlowerSplitError,
    RefusalReason,
    RoundLost,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, Dispatch, RoundPlan, RoundReport
from flower_split.runtime import failpoints
from flower_split.server.federation.exchange import describe, failure_text
from flower_split.server.federation.replies import check_values, scalars, without_steps
from flower_split.server.inner.fedbuff import Arrived, FedBuff
from flower_split.server.inner.state import load_state, state_of
from flower_split.server.rounds import RoundOutcome, TrunkCare, evaluate_clients, with_retries
from flower_split.server.trunk_strategy import TrunkStrategy

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0  # between two looks at the trunk
_TTL_SPARE = 60.0  # seconds that Flower keeps a message beyond our own deadline

ArrivalsSink = Callable[[int, Sequence[Mapping[str, int | float | str]]], None]
"""Receives ``(server_round, records)``: who arrived, in this order, and who was dropped why."""

_Record = dict[str, int | float | str]


@dataclass(slots=True)
class _AtWork:
    """A client that has been sent out."""

    dispatch: Dispatch
    base_round: int
    message: Message
    sent: Mapping[str, Tensor]
    deadline: float  # on the monotonic clock
    recalled: str = ""  # why its work is not wanted any more; it is busy until it says so


class AsynchronousRounds:
    """Sends clients out, collects them, and closes rounds.

    Args:
        strategy: The run's strategy around ``inner``; its trunk, commit point and attempt are used.
        inner: The adapters' side.
        grid: Flower's grid.
        at_once: Clients that can run at a time, such as in a simulation; 0: any number.
        on_steps: Receives the step metrics of the arrivals of a round.
        on_arrivals: Receives who arrived, before the round is committed.
    """

    def __init__(
        self,
        strategy: TrunkStrategy,
        inner: FedBuff,
        grid: Grid,
        *,
        at_once: int = 0,
        on_steps: Callable[[int, int, Mapping[str, list[float]], Mapping[str, float]], None]
        | None = None,
        on_arrivals: ArrivalsSink | None = None,
    ) -> None:
        self.strategy = strategy
        self.grid = grid
        self._inner = inner
        self._federation = strategy.federation
        self._config = strategy.config
        self._size = strategy.config.strategy.buffer_size
        self._concurrency = _concurrency(strategy, at_once)
        self._on_steps = on_steps
        self._on_arrivals = on_arrivals
        self._arrays = ArrayRecord()
        self._at_work: dict[str, _AtWork] = {}  # by message id
        self._waiting: list[Arrived] = []  # arrivals, oldest first, that no round has taken
        self._buffer: list[Arrived] = []  # of the open round
        self._failures: dict[int, int] = {}  # slot -> in a row
        self._left_out: dict[int, str] = {}  # slot -> why it takes no further part
        self._sent_from: dict[int, int] = {}  # slot -> the version that it was sent out with last
        self._epoch = 0  # of the trunk process that everybody at work was sent out with
        self._dropped: list[_Record] = []
        self._looked = time.monotonic()
        logger.info(
            "fedbuff: %d clients at work at a time, %d arrivals make a round, at most %d versions late",
            self._concurrency,
            self._size,
            strategy.config.strategy.max_staleness,
        )

    def run(
        self, server_round: int, arrays: ArrayRecord, trunk: TrunkCare
    ) -> tuple[ArrayRecord, MetricRecord]:
        """One round: fill the buffer, step, commit.

        Args:
            server_round: From 1.
            arrays: The global adapter of the round before.
            trunk: How the trunk's process is looked after.

        Raises:
            RoundLost: The trunk or its round was lost; whoever was at work is forgotten.
            FederationError: Too many clients have failed, or the round cannot be closed.
            TrunkError: The trunk does not answer, or refuses the round.
        """
        try:
            self._arrays = arrays
            self._fill(server_round, trunk)
            return self._close(server_round)
        except BaseException as error:
            self._forget(server_round, f"the ServerApp could not finish the round: {error}")
            raise

    def dismiss(self) -> None:
        """The run needs nobody any more: whoever is at work ends at the next call."""
        if self._at_work or self._waiting:
            after = self._config.num_server_rounds + 1
            self._at_work, self._waiting = {}, []
            try:
                self.strategy.coordinator.begin_round(self._plan(after))
            except TrunkError as error:
                logger.warning("the clients still at work could not be recalled: %s", error)
            self._forget(after, "the run's last round is committed")

    # ------------------------------------------------------------------ filling the buffer

    def _fill(self, server_round: int, trunk: TrunkCare) -> None:
        self._recall_stale(server_round)
        self._take(server_round)
        self._send(server_round)
        pause = 0.02
        while len(self._buffer) < self._size:
            came = self._pull(server_round)
            self._expire()
            self._take(server_round)
            if len(self._buffer) < self._size and self._choose(server_round):
                self._send(server_round)
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                self._looked = time.monotonic()
                self._look(server_round, trunk)
            pause = 0.02 if came else min(pause * 1.5, 0.5)
            if not came:
                time.sleep(pause)

    def _take(self, server_round: int) -> None:
        """Move arrivals into the buffer, oldest first, as long as they are not too stale."""
        while self._waiting and len(self._buffer) < self._size:
            arrived = self._waiting.pop(0)
            behind = arrived.staleness(server_round)
            if behind > self._config.strategy.max_staleness:
                self._drop(arrived.dispatch, arrived.base_round, self._too_stale(behind))
            else:
                self._buffer.append(arrived)

    def _recall_stale(self, server_round: int) -> None:
        for item in self._at_work.values():
            behind = server_round - 1 - item.base_round
            if behind > self._config.strategy.max_staleness and not item.recalled:
                item.recalled = self._too_stale(behind)
                self._drop(item.dispatch, item.base_round, item.recalled)

    def _too_stale(self, behind: int) -> str:
        limit = self._config.strategy.max_staleness
        return f"it is {behind} versions behind, above strategy.max-staleness {limit}"

    def _drop(self, dispatch: Dispatch, base_round: int, why: str) -> None:
        who = describe({dispatch.slot: why}, self._federation)
        logger.warning("dispatch %d was dropped: %s", dispatch.number, who)
        self._dropped.append(
            {
                "partition_id": dispatch.slot,
                "dispatch": dispatch.number,
                "base_round": base_round,
                "dropped": why,
            }
        )

    def _send(self, server_round: int) -> None:
        """Name everybody to the trunk, and send idle clients out."""
        slots = self._choose(server_round)
        new: list[_AtWork] = []
        deadline = time.monotonic() + self._config.round_timeout
        for slot in slots:
            self._inner.dispatched += 1
            dispatch = Dispatch(self._inner.dispatched, slot, secrets.token_urlsafe(32))
            message, sent = self._inner.order(
                dispatch,
                self._federation.nodes[slot],
                self._arrays,
                ahead=sum(item.dispatch.slot == slot for item in (*self._buffer, *self._waiting)),
                ttl=self._config.round_timeout + _TTL_SPARE,
            )
            message = self.strategy.addressed(message, dispatch.token, server_round)
            new.append(_AtWork(dispatch, server_round - 1, message, sent, deadline))
            self._sent_from[slot] = server_round - 1
        others = bool(self._at_work or self._waiting or self._buffer)
        plan = self._plan(server_round, [item.dispatch for item in new])
        if not plan.dispatches:
            return
        lost = (
            f"round {server_round}: the trunk has restarted; what its clients had computed with it is "
            "gone."
        )
        try:
            epoch, _ = self.strategy.coordinator.begin_round(plan)
        except TrunkRefused as error:  # by another process, which knows nobody of those at work?
            if others and self.strategy.coordinator.status().epoch != self._epoch:
                raise RoundLost(lost) from error
            raise
        if others and epoch != self._epoch:
            raise RoundLost(lost)
        self._epoch = self.strategy.epoch = epoch
        for item in new:
            name = next(iter(self.grid.push_messages([item.message])), "")
            if name:
                self._at_work[name] = item
            else:
                self._failed(item, "Flower did not take its message")

    def _choose(self, server_round: int) -> list[int]:
        """The slots to send out now, ascending."""
        busy = {item.dispatch.slot for item in self._at_work.values()}
        room = self._concurrency - len(busy)
        useful = sum(not item.recalled for item in self._at_work.values())
        last = server_round == self._config.num_server_rounds
        if last or self._config.strategy.max_staleness == 0:  # more could not be used
            room = min(room, self._size - len(self._buffer) - len(self._waiting) - useful)
        idle = [s for s in self._federation.slots if s not in busy and s not in self._left_out]
        generator = random.Random(f"{self._config.seed}/dispatch/{self._inner.dispatched + 1}")
        generator.shuffle(idle)
        idle.sort(key=lambda slot: self._sent_from.get(slot, -1) == server_round - 1)
        return sorted(idle[: max(0, room)])

    def _plan(self, server_round: int, new: Sequence[Dispatch] = ()) -> RoundPlan:
        """The trunk's round with everybody whose work counts or may yet count."""
        trunk, strategy = self._config.trunk, self.strategy
        arrived = [item.dispatch for item in (*self._buffer, *self._waiting)]
        at_work = [item.dispatch for item in self._at_work.values() if not item.recalled]
        return RoundPlan(
            experiment=strategy.experiment,
            server_round=server_round,
            attempt=strategy.attempt,
            participants={},
            step_every=StepEvery.BUFFER,
            num_server_rounds=self._config.num_server_rounds,
            join_seconds=trunk.join_timeout,
            window_seconds=trunk.window_timeout,
            base=strategy.base,
            dispatches=tuple(sorted([*arrived, *at_work, *new], key=lambda item: item.number)),
        )

    def _pull(self, server_round: int) -> bool:
        """Take in the replies that have come; whether there were any."""
        came = []
        for reply in self.grid.pull_messages(set(self._at_work)) if self._at_work else ():
            item = self._at_work.pop(reply.metadata.reply_to_message_id, None)
            if item is None:
                logger.warning("a reply to a dispatch that is over was ignored")
            else:
                came.append((item, reply))
        for item, reply in sorted(came, key=lambda pair: pair[0].dispatch.number):
            slot = item.dispatch.slot
            if item.recalled:
                continue
            text = failure_text(reply) or self._objection(server_round, slot, reply)
            if text:
                self._failed(item, text)
                continue
            self._failures.pop(slot, None)
            arrived = Arrived(item.dispatch, item.base_round, item.sent, reply.content)
            self._waiting.append(arrived)
        return bool(came)

    def _objection(self, server_round: int, slot: int, reply: Message) -> str:
        """Why a reply cannot be used; empty if it can."""
        try:
            check_values({slot: reply}, self._federation, server_round, self._inner)
        except FederationError as error:
            return str(error)
        return ""

    def _expire(self) -> None:
        """Whoever has not come back by its deadline has failed."""
        now = time.monotonic()
        for name in [name for name, item in self._at_work.items() if now > item.deadline]:
            item = self._at_work.pop(name)
            seconds = f"{self._config.round_timeout:g}"
            self._failed(item, item.recalled or f"no reply within {seconds} s (round-timeout)")

    def _failed(self, item: _AtWork, why: str) -> None:
        """A client has failed: it is sent out again, or left out of the run.

        Raises:
            FederationError: Too few clients are left.
        """
        slot = item.dispatch.slot
        self._failures[slot] = self._failures.get(slot, 0) + 1
        self._sent_from.pop(slot, None)
        self._drop(item.dispatch, item.base_round, why)
        if self._failures[slot] <= self._config.round_retries:
            return
        self._left_out[slot] = why
        total = len(self._federation.slots)
        left = total - len(self._left_out)
        needed = max(1, math.ceil(total * self._config.trunk.quorum_of(total) - 1e-9))
        named = describe(self._left_out, self._federation)
        logger.warning("the run goes on without %s", named)
        if left < needed:
            raise FederationError(
                f"{len(self._left_out)} of {total} clients have failed more than round-retries = "
                f"{self._config.round_retries} times in a row, and the quorum (trunk.quorum, "
                f"trunk.quorum-count) needs {needed}. Cause: {named.rstrip('.')}. Mend it and start "
                "the run again, or lower trunk.quorum to go on without them."
            )

    def _look(self, server_round: int, trunk: TrunkCare) -> None:
        """Look at the trunk, and say where the round stands.

        Raises:
            RoundLost: Its process has ended or has been started again, or the round was given up.
        """
        if not trunk.alive():
            raise RoundLost("the trunk process ended; its last log lines say why")
        try:
            status = self.strategy.coordinator.status()
        except TrunkError as error:
            logger.warning("the trunk does not report its status: %s", error)
            return
        if status.epoch != self._epoch:
            raise RoundLost(f"round {server_round}: the trunk has restarted.")
        if status.phase == "aborted":
            raise RoundLost(f"round {server_round}: the trunk gave it up: {status.problem}")
        megabytes = (status.bytes_received + status.bytes_sent) / 1e6
        logger.info(
            "round %d/%d %d of %d arrived, %d at work, %.1f MB of theirs",
            server_round,
            self._config.num_server_rounds,
            len(self._buffer) + len(self._waiting),
            self._size,
            len(self._at_work),
            megabytes,
        )

    # ------------------------------------------------------------------ closing the round

    def _close(self, server_round: int) -> tuple[ArrayRecord, MetricRecord]:
        """Step on both sides with the buffer, and commit."""
        buffer, before = self._buffer, state_of(self._inner)
        report = self._prepare(server_round, buffer)
        failpoints.reach("server.aggregate.before")
        try:
            arrays, metrics = self._aggregate(server_round, buffer)
            if self._on_arrivals is not None:
                self._on_arrivals(server_round, [*self._records(server_round), *self._dropped])
            self.strategy.commit(server_round, report, arrays)
        except BaseException:
            load_state(self._inner, before)
            raise
        self._buffer, self._dropped = [], []
        self.strategy.last_report = report
        return arrays, metrics

    def _prepare(self, server_round: int, buffer: Sequence[Arrived]) -> RoundReport:
        strategy = self.strategy
        arrivals = [
            Arrival(item.dispatch.number, self._inner.staleness(item.staleness(server_round)))
            for item in buffer
        ]
        try:
            return strategy.coordinator.prepare_round(
                strategy.experiment, server_round, strategy.attempt, arrivals
            )
        except FlowerSplitError as error:
            lost = isinstance(error, TrunkUnavailable) or (
                isinstance(error, TrunkRefused)
                and error.reason
                in (RefusalReason.WRONG_ATTEMPT, RefusalReason.UNKNOWN_CONTRIBUTION)
            )
            raise (RoundLost if lost else FederationError)(
                f"round {server_round}: the trunk cannot close the round: {error}"
            ) from error

    def _aggregate(
        self, server_round: int, buffer: Sequence[Arrived]
    ) -> tuple[ArrayRecord, MetricRecord]:
        plain = []
        for arrived in buffer:
            content, steps = without_steps(arrived.content)
            if self._on_steps is not None:
                numbers = scalars(arrived.content)
                self._on_steps(server_round, arrived.dispatch.slot, steps, numbers)
            plain.append(replace(arrived, content=content))
        return self._inner.aggregate_arrivals(server_round, plain)

    def _records(self, server_round: int) -> list[_Record]:
        records: list[_Record] = []
        for order, arrived in enumerate(self._buffer):
            behind = arrived.staleness(server_round)
            records.append(
                {
                    "order": order,
                    "partition_id": arrived.dispatch.slot,
                    "dispatch": arrived.dispatch.number,
                    "base_round": arrived.base_round,
                    "staleness": behind,
                    "factor": self._inner.staleness(behind),
                }
            )
        return records

    def _forget(self, server_round: int, why: str) -> None:
        """Give the trunk's round up, and with it everybody at work."""
        self._at_work, self._waiting, self._buffer = {}, [], []
        self._failures, self._sent_from, self._dropped = {}, {}, []
        strategy = self.strategy
        try:
            strategy.coordinator.abort_round(
                strategy.experiment, server_round, strategy.attempt, why
            )
        except TrunkError as error:
            logger.warning("round=%d the trunk could not abort: %s", server_round, error)


def _concurrency(strategy: TrunkStrategy, at_once: int) -> int:
    """Clients at work at a time: what is configured, as far as it can be had.

    Raises:
        FederationError: More are configured than there are.
    """
    total, wanted = len(strategy.federation.slots), strategy.config.strategy.concurrency
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
    trunk: TrunkCare,
) -> ArrayRecord:
    """Run the asynchronous rounds ``start_round … num-server-rounds``.

    Args:
        rounds: Sends clients out and closes rounds.
        arrays: The global adapter that ``start_round`` begins with.
        start_round: From 1; above 1 when a run is resumed.
        on_round: Called after every round.
        trunk: How the trunk process is looked after.

    Returns:
        The global adapter after the last round.

    Raises:
        FederationError: Too many clients failed; nothing of the open round was kept.
        TrunkError: The trunk does not answer, or refuses a round.
    """
    strategy, grid = rounds.strategy, rounds.grid
    last = strategy.config.num_server_rounds
    for server_round in range(start_round, last + 1):
        start, label = time.monotonic(), f"round {server_round}/{last}"
        attempt = partial(rounds.run, server_round, arrays, trunk)
        arrays, train = with_retries(strategy, attempt, label, trunk)
        if server_round == last:
            rounds.dismiss()
        evaluation = evaluate_clients(strategy, grid, arrays, server_round, label, trunk)
        on_round(RoundOutcome(server_round, train, evaluation, time.monotonic() - start))
    return arrays
