"""Stand-ins for Flower's grid and the trunk's coordinator, with a record of what they were asked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    Error,
    Message,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from torch import Tensor

from flower_split.messages.replies import TrainReply
from flower_split.protocol.values import Arrival, RoundPlan, RoundReport, SlotReport, TrunkStatus

Answer = Callable[[Message], RecordDict | Error | None]
"""What a node replies; None: it never does."""


class FakeGrid(Grid):
    """Nodes that answer at once, in the reverse order of the messages."""

    def __init__(self, nodes: Iterable[int], answer: Answer) -> None:
        self.nodes = list(nodes)
        self.answer = answer
        self.pushed: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = f"message-{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(message)
            self._waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in sorted(message_ids, reverse=True):
            message = self._waiting.pop(name, None)
            content = None if message is None else self.answer(message)
            if message is not None and content is not None:
                replies.append(reply(message, content))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def reply(message: Message, content: RecordDict | Error) -> Message:
    """A node's reply to ``message``."""
    return Message(content, reply_to=message)


def arrays(**values: list[float]) -> ArrayRecord:
    """An ArrayRecord of small fp32 vectors."""
    return ArrayRecord({k: Array(np.array(v, dtype=np.float32)) for k, v in values.items()})


def train_content(
    weights: ArrayRecord,
    tokens: int,
    *,
    examples: int = 1,
    loss: float = 1.0,
    private_digest: str = "",
    weight_norms: Mapping[str, bytes] = MappingProxyType({}),
) -> RecordDict:
    """What the ClientApp sends after training."""
    return TrainReply(
        adapter=weights,
        train_loss=loss,
        num_tokens=tokens,
        num_examples=examples,
        bytes_sent=0,
        bytes_received=0,
        steps={"loss": [loss, loss / 2]},
        weight_norms=weight_norms,
        private_digest=private_digest,
    ).write()


@dataclass
class FakeCoordinator:
    """A trunk that accepts everything; ``incomplete`` slots are reported as left out."""

    incomplete: Mapping[int, str] = field(default_factory=dict)
    prepare_error: Exception | None = None
    commit_error: Exception | None = None
    state: TrunkStatus = TrunkStatus(epoch=1, version=0)
    plans: list[RoundPlan] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    whys: list[str] = field(default_factory=list)

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        self.plans.append(plan)
        self.calls.append("begin")
        return 1, 0

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        self.calls.append("prepare")
        if self.prepare_error is not None:
            raise self.prepare_error
        slots = tuple(
            SlotReport(
                slot=slot,
                completed=slot not in self.incomplete,
                problem=self.incomplete.get(slot, ""),
            )
            for slot in self.plans[-1].participants
        )
        return RoundReport(
            version=1, digest="", slots=slots, optimizer_steps=1, compute_seconds=0.0
        )

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        self.calls.append("commit")
        if self.commit_error is not None:
            raise self.commit_error
        return 1

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        self.calls.append("abort")
        self.whys.append(why)
        return 0

    def status(self) -> TrunkStatus:
        return self.state

    def get_adapter(self) -> dict[str, Tensor]:
        return {}
