"""The buffer of arrivals that makes an asynchronous round, and what becomes of late ones.

An arrival's *staleness* is the number of versions between what its client was sent and what the round
changes. One above ``strategy.max-staleness`` is dropped and recorded.
"""

import logging
from collections.abc import Sequence

from flower_split.protocol.values import Dispatch
from flower_split.server.federation.nodes import Federation, describe
from flower_split.server.inner.fedbuff import ClientArrival, FedBuff
from flower_split.server.metric_sinks import Record

logger = logging.getLogger(__name__)


class Arrivals:
    """Arrivals that wait, those of the open round, and records of both and of what was dropped.

    Args:
        inner: Weighs arrivals by their staleness.
        federation: The run's nodes, for errors.
        size: Arrivals of one round (``strategy.buffer-size``).
        max_staleness: Versions that an arrival may be behind (``strategy.max-staleness``).
    """

    def __init__(
        self, inner: FedBuff, federation: Federation, *, size: int, max_staleness: int
    ) -> None:
        self.size = size
        self.max_staleness = max_staleness
        self._inner = inner
        self._federation = federation
        self._waiting: list[ClientArrival] = []  # oldest first; no round has taken them
        self._buffer: list[ClientArrival] = []  # of the open round, in order of arrival
        self._dropped: list[Record] = []  # since the last committed round

    @property
    def buffer(self) -> Sequence[ClientArrival]:
        """Return the arrivals of the open round, in the order in which they came."""
        return tuple(self._buffer)

    @property
    def pending(self) -> Sequence[ClientArrival]:
        """Return all arrivals that are not aggregated yet: of the open round, then waiting ones."""
        return (*self._buffer, *self._waiting)

    @property
    def full(self) -> bool:
        """Return whether the open round has all its arrivals."""
        return len(self._buffer) >= self.size

    @property
    def waiting(self) -> bool:
        """Return whether arrivals wait that no round has taken."""
        return bool(self._waiting)

    def add(self, arrival: ClientArrival) -> None:
        """Let an arrival wait for a round."""
        self._waiting.append(arrival)

    def take(self, server_round: int) -> None:
        """Move waiting arrivals into the open round, oldest first; drop those that are too stale."""
        while self._waiting and not self.full:
            arrival = self._waiting.pop(0)
            why = self.objection(server_round, arrival.base_round)
            if why:
                self.drop(arrival.dispatch, arrival.base_round, why)
            else:
                self._buffer.append(arrival)

    def objection(self, server_round: int, base_round: int) -> str:
        """Return why work on version ``base_round`` is too late for a round; empty: it is not."""
        behind = server_round - 1 - base_round
        if behind <= self.max_staleness:
            return ""
        return f"it is {behind} versions behind, above strategy.max-staleness {self.max_staleness}"

    def drop(self, dispatch: Dispatch, base_round: int, why: str) -> None:
        """Log and record that a dispatch's work will not be used."""
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

    def records(self, server_round: int) -> list[Record]:
        """Return who arrived for the open round, in this order, then who was dropped why."""
        arrived: list[Record] = []
        for order, arrival in enumerate(self._buffer):
            behind = arrival.staleness(server_round)
            arrived.append(
                {
                    "order": order,
                    "partition_id": arrival.dispatch.slot,
                    "dispatch": arrival.dispatch.number,
                    "base_round": arrival.base_round,
                    "staleness": behind,
                    "factor": self._inner.staleness(behind),
                }
            )
        return [*arrived, *self._dropped]

    def committed(self) -> None:
        """Begin the next round: the buffer and what was dropped are recorded."""
        self._buffer, self._dropped = [], []

    def forget_waiting(self) -> None:
        """Drop the arrivals that no round will take any more."""
        self._waiting = []

    def forget(self) -> None:
        """Drop everything: the round is lost, and its clients are sent out again."""
        self._waiting, self._buffer, self._dropped = [], [], []
