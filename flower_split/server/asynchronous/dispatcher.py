"""The dispatcher: choose idle clients, send them out, collect their replies, give up the silent.

A *dispatch* is one client sent to train on one version of the weights. It is named to the trunk before
its message goes out, so that the trunk keeps that version for it
(:mod:`flower_split.trunk.engine.dispatches`).
"""

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from flower_split.errors import FederationError, RoundLost, TrunkError, TrunkRefused
from flower_split.messages.error_codes import KEY_LOST
from flower_split.protocol.values import Dispatch
from flower_split.server.asynchronous.arrivals import Arrivals
from flower_split.server.federation.exchange import failure_text
from flower_split.server.federation.nodes import describe
from flower_split.server.federation.replies import check_values
from flower_split.server.inner.fedbuff import ClientArrival, FedBuff
from flower_split.server.trunk_strategy import TrunkStrategy

logger = logging.getLogger(__name__)

_TTL_SPARE = 60.0  # seconds that Flower keeps a message beyond our own deadline


@dataclass(slots=True)
class _OpenDispatch:
    """A client that has been sent out and has not replied."""

    dispatch: Dispatch
    base_round: int
    message: Message
    sent: Mapping[str, Tensor]
    deadline: float  # on the monotonic clock
    recalled: str = ""  # why its work is not wanted any more; it is busy until it says so


class Dispatcher:
    """Keep up to ``concurrency`` clients at work, and turn their replies into arrivals.

    Args:
        strategy: The run's strategy; its trunk rounds name the dispatches to the trunk.
        inner: Writes the messages.
        grid: Flower's grid.
        arrivals: Receives what comes back.
        concurrency: Clients at work at a time, at most.
    """

    def __init__(
        self,
        strategy: TrunkStrategy,
        inner: FedBuff,
        grid: Grid,
        arrivals: Arrivals,
        *,
        concurrency: int,
    ) -> None:
        self._trunk_rounds = strategy.trunk_rounds
        self._federation = strategy.federation
        self._client_keys = strategy.client_keys
        self._keyless: set[int] = set()
        self._config = strategy.config
        self._inner = inner
        self._grid = grid
        self._arrivals = arrivals
        self._concurrency = concurrency
        self._open: dict[str, _OpenDispatch] = {}  # by message id
        self._failures: dict[int, int] = {}  # partition -> in a row
        self._left_out: dict[int, str] = {}  # partition -> why it takes no further part
        self._sent_from: dict[
            int, int
        ] = {}  # partition -> the version that it was sent out with last
        # The trunk process that all open dispatches were named to. TrunkRounds.epoch is not enough:
        # an evaluation in between may have begun on another process.
        self._epoch = 0

    @property
    def num_open(self) -> int:
        """Return how many clients are at work."""
        return len(self._open)

    @property
    def epoch(self) -> int:
        """Return the epoch of the trunk process that the open dispatches were named to."""
        return self._epoch

    # ------------------------------------------------------------------ sending

    def send(self, server_round: int, arrays: ArrayRecord) -> None:
        """Send idle clients out, and name everybody whose work counts to the trunk.

        Args:
            server_round: The open round, from 1.
            arrays: The global adapter of the round before.

        Raises:
            RoundLost: The trunk has restarted; what its clients had computed with it is gone.
            TrunkError: It does not answer, or refuses.
            FederationError: Flower did not take a message, and too few clients are left.
        """
        new = [
            self._prepare(partition_id, server_round, arrays)
            for partition_id in self.choose(server_round)
        ]
        self._name_to_trunk(server_round, [item.dispatch for item in new])
        # Messages go out only after the trunk knows their tokens: a quick client joins at once.
        for item in new:
            message_id = next(iter(self._grid.push_messages([item.message])), "")
            if message_id:
                self._open[message_id] = item
            else:
                self._fail(item, "Flower did not take its message")

    def choose(self, server_round: int) -> list[int]:
        """Return the partitions to send out now, ascending.

        Clients that have not been sent out with the current version come first; the seed decides
        among equals.
        """
        busy = {item.dispatch.slot for item in self._open.values()}
        room = self._concurrency - len(busy)
        last = server_round == self._config.num_server_rounds
        if last or self._arrivals.max_staleness == 0:  # more could not be used
            useful = sum(not item.recalled for item in self._open.values())
            room = min(room, self._arrivals.size - len(self._arrivals.pending) - useful)
        idle = [
            s for s in self._federation.partition_ids if s not in busy and s not in self._left_out
        ]
        generator = random.Random(f"{self._config.seed}/dispatch/{self._inner.dispatched + 1}")
        generator.shuffle(idle)
        # A stable sort: the shuffled order stays among clients of equal rank.
        idle.sort(
            key=lambda partition_id: self._sent_from.get(partition_id, -1) == server_round - 1
        )
        return sorted(idle[: max(0, room)])

    def _prepare(self, partition_id: int, server_round: int, arrays: ArrayRecord) -> _OpenDispatch:
        """Write the message of a dispatch under the next number."""
        self._inner.dispatched += 1
        dispatch = Dispatch(
            self._inner.dispatched, partition_id, self._client_keys.new_token(partition_id)
        )
        message, sent = self._inner.order(
            dispatch,
            self._federation.nodes[partition_id],
            arrays,
            ahead=sum(item.dispatch.slot == partition_id for item in self._arrivals.pending),
            ttl=self._config.round_timeout + _TTL_SPARE,
        )
        message = self._trunk_rounds.addressed(message, dispatch.token, server_round)
        self._sent_from[partition_id] = server_round - 1
        deadline = time.monotonic() + self._config.round_timeout
        return _OpenDispatch(dispatch, server_round - 1, message, sent, deadline)

    def _name_to_trunk(self, server_round: int, new: Sequence[Dispatch]) -> None:
        """Begin the trunk's round with everybody whose work counts or may yet count."""
        arrived = [item.dispatch for item in self._arrivals.pending]
        working = [item.dispatch for item in self._open.values() if not item.recalled]
        dispatches = [*arrived, *working, *new]
        if not dispatches:
            return
        others = bool(self._open or arrived)  # that an earlier call has named
        lost = (
            f"round {server_round}: the trunk has restarted; what its clients had computed with it is "
            "gone."
        )
        try:
            epoch = self._trunk_rounds.begin_buffer(server_round, dispatches)
        except TrunkRefused as error:  # by another process, which knows nobody of those at work?
            if others and self._trunk_rounds.status().epoch != self._epoch:
                raise RoundLost(lost) from error
            raise
        if others and epoch != self._epoch:
            raise RoundLost(lost)
        self._epoch = epoch

    # ------------------------------------------------------------------ collecting

    def collect(self, server_round: int) -> bool:
        """Turn the replies that have come into arrivals or failures; return whether any came.

        Raises:
            FederationError: A client failed for the last time, and too few are left.
        """
        came, failed = [], False
        for reply in self._grid.pull_messages(set(self._open)) if self._open else ():
            item = self._open.pop(reply.metadata.reply_to_message_id, None)
            if item is None:
                logger.warning("a reply to a dispatch that is over was ignored")
            else:
                came.append((item, reply))
        for item, reply in sorted(came, key=lambda pair: pair[0].dispatch.number):
            partition_id = item.dispatch.slot
            if item.recalled:
                continue
            text = failure_text(reply) or self._objection(server_round, partition_id, reply)
            if text:
                if reply.has_error() and reply.error.code == KEY_LOST:
                    self._keyless.add(partition_id)
                self._fail(item, text)
                failed = True
                continue
            self._failures.pop(partition_id, None)
            self._arrivals.add(
                ClientArrival(item.dispatch, item.base_round, item.sent, reply.content)
            )
        if failed:
            self._leave_out_revoked()
        return bool(came)

    def take_keyless(self) -> dict[int, int]:
        """Return the nodes, by partition, of clients that have lost their key since the last call."""
        found = {slot: self._federation.nodes[slot] for slot in sorted(self._keyless)}
        self._keyless.clear()
        return found

    def _leave_out_revoked(self) -> None:
        """Ask nobody again whom an operator took out at the trunk, which tells its client nothing."""
        try:
            revoked = self._trunk_rounds.status().revoked
        except TrunkError as error:
            logger.warning("the trunk does not report its status: %s", error)
            return
        self.leave_out(revoked)

    def leave_out(self, partition_ids: Sequence[int]) -> None:
        """Go on without clients that an operator revoked; their work is dropped.

        Raises:
            FederationError: Too few clients are left.
        """
        why = "an operator revoked it at the trunk (flower-split trunk-revoke)"
        new = [slot for slot in partition_ids if slot not in self._left_out]
        for item in self._open.values():
            if item.dispatch.slot in new and not item.recalled:
                item.recalled = why
                self._arrivals.drop(item.dispatch, item.base_round, why)
        for partition_id in new:
            self._without(partition_id, why)

    def _objection(self, server_round: int, partition_id: int, reply: Message) -> str:
        """Return why a reply cannot be used; empty if it can."""
        try:
            check_values({partition_id: reply}, self._federation, server_round, self._inner)
        except FederationError as error:
            return str(error)
        return ""

    def expire(self) -> None:
        """Count clients that have not replied by their deadline as failed.

        Raises:
            FederationError: Too few clients are left.
        """
        now = time.monotonic()
        for message_id in [name for name, item in self._open.items() if now > item.deadline]:
            item = self._open.pop(message_id)
            seconds = f"{self._config.round_timeout:g}"
            self._fail(item, item.recalled or f"no reply within {seconds} s (round-timeout)")

    def recall_stale(self, server_round: int) -> None:
        """Drop the work of clients that is too late for this round; they stay busy until they reply."""
        for item in self._open.values():
            why = self._arrivals.objection(server_round, item.base_round)
            if why and not item.recalled:
                item.recalled = why
                self._arrivals.drop(item.dispatch, item.base_round, why)

    def _fail(self, item: _OpenDispatch, why: str) -> None:
        """Count a failure: its client is sent out again, or left out of the run.

        Raises:
            FederationError: Too few clients are left.
        """
        partition_id = item.dispatch.slot
        self._failures[partition_id] = self._failures.get(partition_id, 0) + 1
        self._sent_from.pop(partition_id, None)
        self._arrivals.drop(item.dispatch, item.base_round, why)
        if self._failures[partition_id] <= self._config.round_retries:
            return
        self._without(partition_id, why)

    def _without(self, partition_id: int, why: str) -> None:
        """Leave a client out of the run.

        Raises:
            FederationError: Too few are left.
        """
        self._left_out[partition_id] = why
        total = len(self._federation.partition_ids)
        left = total - len(self._left_out)
        needed = max(1, math.ceil(total * self._config.trunk.quorum_of(total) - 1e-9))
        named = describe(self._left_out, self._federation)
        logger.warning("the run goes on without %s", named)
        if left < needed:
            raise FederationError(
                f"{len(self._left_out)} of {total} clients have failed more than round-retries = "
                f"{self._config.round_retries} times in a row, or were revoked, and the quorum "
                f"(trunk.quorum, trunk.quorum-count) needs {needed}. Cause: "
                f"{named.rstrip('.')}. Fix it and start "
                "the run again, or lower trunk.quorum to go on without them."
            )

    # ------------------------------------------------------------------ ending

    def forget_open(self) -> None:
        """Forget who is at work; a reply that still comes is ignored."""
        self._open = {}

    def forget(self) -> None:
        """Forget everything but who is left out: the round is lost, and clients are sent out again."""
        self._open, self._failures, self._sent_from = {}, {}, {}
