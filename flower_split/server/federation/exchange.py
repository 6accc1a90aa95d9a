"""One exchange of Flower messages: push, wait with a deadline, and say in words what failed.

A *slot* is a client's data partition, the stable name under which the trunk, the strategy and the
reports know it; Flower's node id changes from run to run. :class:`Federation` maps the two.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flower_split.errors import FederationError
from flower_split.messages.error_codes import TRUNK_LOST

logger = logging.getLogger(__name__)

# What stands before the words of an exception that a ClientApp raised, in Flower's own error reply.
_WRAPPING = re.compile(r"^.*Exception ClientAppException occurred\. Message:\s*", re.DOTALL)
_DEAD_ACTOR = "The actor died unexpectedly"  # what Ray says, at length, of a killed client
_CLASS = re.compile(r"^<class '[^']*'>:<'(.*?)'>$", re.DOTALL)

_LOSSES = (
    TRUNK_LOST,
    ErrorCode.UNKNOWN,  # a simulation's actor died
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)

Watch = Callable[[Sequence[Message]], bool]
"""Called after every poll with the replies that are new; True ends the wait."""


@dataclass(frozen=True, slots=True)
class Federation:
    """Which node holds which data partition, fixed for a run.

    Args:
        nodes: Slot (partition id) to Flower node id, ascending in the slot.
    """

    nodes: Mapping[int, int]

    @property
    def slots(self) -> list[int]:
        """All slots, ascending."""
        return sorted(self.nodes)

    def slot_of(self, node_id: int) -> int:
        """The slot of a node.

        Raises:
            FederationError: The node did not take part in the handshake.
        """
        for slot, known in self.nodes.items():
            if known == node_id:
                return slot
        raise FederationError(
            f"node {node_id} joined after the run began; it holds no partition of this run. "
            "Start a new run to include it."
        )


def failure_text(message: Message) -> str:
    """The words of a failed reply, without Flower's wrapping; empty for a reply with content."""
    if not message.has_error():
        return ""
    reason = (message.error.reason or "").strip()
    wrapped = _CLASS.match(reason)
    text = _WRAPPING.sub("", wrapped.group(1) if wrapped else reason)
    if _DEAD_ACTOR in text:
        return (
            "its process died: killed, crashed, or out of memory (a simulation does not replace "
            "it; a new run can resume this one)"
        )
    return " ".join(text.split()) or f"no reason given (Flower's error code {message.error.code})"


def exchange(
    grid: Grid, messages: Iterable[Message], *, timeout: float, watch: Watch | None = None
) -> list[Message]:
    """Send ``messages`` and wait for their replies, at most ``timeout`` seconds.

    The messages carry their ids afterwards, so that a reply's ``reply_to_message_id`` finds its
    message (the error of a dead node names no source node). Replies that did not come in time are
    missing from the result, as with ``Grid.send_and_receive``.

    Args:
        grid: Flower's grid.
        messages: Instruction messages, one for each node.
        timeout: Seconds until the wait ends.
        watch: Called after every poll; see :data:`Watch`.
    """
    sent = list(messages)
    if not sent:
        return []
    pushed = list(grid.push_messages(sent))
    waiting = {message_id for message_id in pushed if message_id}
    if len(waiting) < len(sent):
        logger.warning("Flower took %d of %d messages", len(waiting), len(sent))
    replies: list[Message] = []
    deadline = time.monotonic() + timeout
    pause = 0.05
    while waiting:
        new = list(grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in new}
        replies += new
        if watch is not None and watch(new):
            break
        if not waiting or time.monotonic() >= deadline:
            break
        time.sleep(min(pause, max(deadline - time.monotonic(), 0.0)))
        pause = min(pause * 1.5, 1.0)
    return replies


def lost_slots(
    federation: Federation, sent: Sequence[Message], replies: Iterable[Message]
) -> set[int]:
    """Slots whose failure is the loss of a process or a connection, not of their own making."""
    by_message = {message.metadata.message_id: message for message in sent}
    lost = {federation.slot_of(message.metadata.dst_node_id) for message in sent}
    for reply in replies:
        message = by_message.get(reply.metadata.reply_to_message_id)
        if message is not None and not (reply.has_error() and reply.error.code in _LOSSES):
            lost.discard(federation.slot_of(message.metadata.dst_node_id))
    return lost


def by_slot(
    federation: Federation, sent: Sequence[Message], replies: Iterable[Message]
) -> tuple[dict[int, Message], dict[int, str]]:
    """Sort replies by slot into good ones and reasons of failure.

    Args:
        federation: The run's nodes.
        sent: The messages that were sent, after :func:`exchange`.
        replies: Their replies, in any order; missing ones count as failures.

    Returns:
        ``(good, problems)``, both by slot, ascending.
    """
    slots = {message.metadata.message_id: federation.slot_of(message.metadata.dst_node_id)
             for message in sent}  # fmt: skip
    good: dict[int, Message] = {}
    problems = {slot: "no reply within the deadline" for slot in slots.values()}
    for reply in replies:
        slot = slots.get(reply.metadata.reply_to_message_id)
        if slot is None:
            logger.warning("a reply to a message of another phase was ignored")
            continue
        text = failure_text(reply)
        if text:
            problems[slot] = text
        else:
            good[slot] = reply
            problems.pop(slot, None)
    return dict(sorted(good.items())), dict(sorted(problems.items()))


def describe(problems: Mapping[int, str], federation: Federation) -> str:
    """Reasons of failure in one paragraph: equal texts once, with all partitions they concern."""
    return "; ".join(
        f"partition{'s' if len(slots) > 1 else ''} "
        + ", ".join(f"{slot} (node {federation.nodes[slot]})" for slot in slots)
        + f": {text}"
        for text, slots in _by_text(problems).items()
    )


def describe_nodes(problems: Mapping[int, str], federation: Federation) -> str:
    """As :func:`describe`, before the partitions are known: by node ids."""
    return "; ".join(
        f"node{'s' if len(slots) > 1 else ''} "
        + ", ".join(str(federation.nodes[slot]) for slot in slots)
        + f": {text}"
        for text, slots in _by_text(problems).items()
    )


def _by_text(problems: Mapping[int, str]) -> dict[str, list[int]]:
    by_text: dict[str, list[int]] = {}
    for slot, text in sorted(problems.items()):
        by_text.setdefault(text, []).append(slot)
    return by_text
