"""One phase of a round: who was asked, who is lost, and whether enough clients completed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from flower_split.errors import FederationError, RoundLost
from flower_split.server.federation.exchange import by_partition, left_partitions, lost_partitions
from flower_split.server.federation.nodes import Federation, describe


@dataclass(slots=True)
class TrunkPhase:
    """The training or the evaluation of one round, from its messages to its replies.

    Args:
        server_round: Number of the round, from 1; 0 for the evaluation before round 1.
        evaluate: Whether it only evaluates.
        messages: What was sent, by partition, ascending.
        federation: The run's nodes.
        quorum: Share of the clients that must complete a training; see ``trunk.quorum``.
    """

    server_round: int
    evaluate: bool
    messages: Mapping[int, Message]
    federation: Federation
    quorum: float
    _cause: str = field(default="", init=False)  # why it was ended before its clients were done
    _trunk_lost: bool = field(default=False, init=False)
    _failed_first: dict[int, str] = field(default_factory=dict, init=False)  # and so ended it
    _lost: set[int] = field(default_factory=set, init=False)  # lost a process or a connection
    _left: set[int] = field(default_factory=set, init=False)  # whose node or process is gone
    _silent: set[int] = field(default_factory=set, init=False)  # who has not answered at all

    @property
    def partition_ids(self) -> list[int]:
        """Return the partitions that were asked, ascending."""
        return list(self.messages)

    @property
    def required(self) -> int:
        """Return how many clients must complete; one is enough to evaluate."""
        if self.evaluate:
            return 1
        return max(1, math.ceil(len(self.messages) * self.quorum - 1e-9))

    def failures(self, replies: Iterable[Message]) -> dict[int, str]:
        """Return the reasons of the failed replies among ``replies``, by partition.

        Clients that have not replied yet do not count.
        """
        arrived = list(replies)
        answered = {reply.metadata.reply_to_message_id for reply in arrived}
        sent = [m for m in self.messages.values() if m.metadata.message_id in answered]
        return by_partition(self.federation, sent, arrived)[1]

    def can_succeed(self, failed: Mapping[int, str]) -> bool:
        """Return whether enough clients can still complete without those that ``failed``."""
        return len(self.messages) - len(failed) >= self.required

    def mark_stopped(self, why: str) -> None:
        """Note why the phase ends early; the first reason stays."""
        self._cause = self._cause or why

    def mark_failed(self, failed: Mapping[int, str]) -> None:
        """Note whose failures end the phase early: later ones are their consequences."""
        self._failed_first = self._failed_first or dict(failed)

    def mark_lost(self, why: str) -> None:
        """Note that its trunk is gone: whoever has not completed has lost the round."""
        self.mark_stopped(why)
        self._trunk_lost = True

    def sort(self, replies: Iterable[Message]) -> tuple[dict[int, Message], dict[int, str]]:
        """Sort the final replies into good ones and reasons of failure, both by partition, ascending."""
        arrived, sent = list(replies), list(self.messages.values())
        self._lost = lost_partitions(self.federation, sent, arrived)
        self._left = left_partitions(self.federation, sent, arrived)
        answered = {reply.metadata.reply_to_message_id for reply in arrived}
        self._silent = {
            partition_id
            for partition_id, message in self.messages.items()
            if message.metadata.message_id not in answered
        }
        return by_partition(self.federation, sent, arrived)

    def is_lost(self, problems: Mapping[int, str]) -> bool:
        """Return whether ``problems`` are losses of processes or connections alone."""
        return self._trunk_lost or self._lost >= set(problems)

    def check_enough(self, good: Mapping[int, Message], problems: Mapping[int, str]) -> None:
        """Check that enough clients completed; call it after :meth:`sort`.

        Raises:
            RoundLost: Too few did, because processes or connections were lost: it may be repeated.
            FederationError: Too few did, for another reason.
        """
        if len(good) >= self.required:
            return
        total, required = len(self.messages), self.required
        lower = " Or lower trunk.quorum to go on without them." if required > 1 else ""
        why = self._why(problems)
        text = (
            f"round {self.server_round}: {len(good)} of {total} clients completed, and the quorum "
            f"(trunk.quorum, trunk.quorum-count) needs {required}. Cause: {why.rstrip('.')}. "
            f"Fix it, then resume the run or start it again.{lower}"
        )
        if not self.is_lost(problems):
            raise FederationError(text)
        gone = self._left | self._silent
        raise RoundLost(
            text,
            {partition_id: self.federation.nodes[partition_id] for partition_id in sorted(gone)},
        )

    def _why(self, problems: Mapping[int, str]) -> str:
        """Return the cause of a failed phase: clients that left first, with their nodes.

        Where one client is gone, the trunk ends the round of all: the others' failures follow from
        it, and are not the cause even if they were heard of first.
        """
        left = {
            partition_id: text
            for partition_id, text in problems.items()
            if partition_id in self._left
        }
        if self._cause:
            named = f"; left the run: {describe(left, self.federation)}" if left else ""
            return self._cause.rstrip(".") + named
        others = {s: t for s, t in (self._failed_first or problems).items() if s not in left}
        if not left or not others:
            return describe(left or others, self.federation)
        return (
            f"left the run: {describe(left, self.federation)}; "
            f"then failed: {describe(others, self.federation)}"
        )
