"""One exchange of Flower messages: push, wait with a deadline, and sort the replies.

Failures come back as words without Flower's wrapping, by partition.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flower_split.messages.error_codes import KEY_LOST, TRUNK_LOST
from flower_split.server.federation.nodes import Federation

logger = logging.getLogger(__name__)

# What stands before the words of an exception that a ClientApp raised, in Flower's own error reply.
_WRAPPING = re.compile(r"^.*Exception ClientAppException occurred\. Message:\s*", re.DOTALL)
_DEAD_ACTOR = "The actor died unexpectedly"  # what Ray says, at length, of a killed client
_CLASS = re.compile(r"^<class '[^']*'>:<'(.*?)'>$", re.DOTALL)

_GONE = (  # the node, or the client's process on it
    ErrorCode.UNKNOWN,  # a simulation's actor died
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)
_LOSSES = (TRUNK_LOST, KEY_LOST, *_GONE)
_ASKED_AGAIN = (KEY_LOST, *_GONE)  # before the next attempt

# A reply is noticed after at most this share of the time that it took, and a look that brings nothing is
# followed by a pause of so many times its own length: over a network it costs the machines' processors.
_POLL_SHARE = 0.01
_PAUSE_OF_A_LOOK = 10.0
_SHORTEST_POLL, _LONGEST_POLL = 0.01, 1.0  # seconds

Watch = Callable[[Sequence[Message]], bool]
"""Called after every poll with the replies that are new; True ends the wait."""


def failure_text(message: Message) -> str:
    """Return why a reply failed, without Flower's wrapping; empty for a reply with content."""
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
    began = time.monotonic()
    deadline = began + timeout
    while waiting:
        looked = time.monotonic()
        new = list(grid.pull_messages(waiting))
        look = 0.0 if new else time.monotonic() - looked
        waiting -= {reply.metadata.reply_to_message_id for reply in new}
        replies += new
        if watch is not None and watch(new):
            break
        if not waiting or time.monotonic() >= deadline:
            break
        now = time.monotonic()
        pause = max(_SHORTEST_POLL, _POLL_SHARE * (now - began), _PAUSE_OF_A_LOOK * look)
        time.sleep(min(pause, _LONGEST_POLL, max(deadline - now, 0.0)))
    return replies


def lost_partitions(
    federation: Federation, sent: Sequence[Message], replies: Iterable[Message]
) -> set[int]:
    """Return the partitions that failed by losing a process or a connection, not by an error."""
    by_message = {message.metadata.message_id: message for message in sent}
    lost = {federation.partition_of(message.metadata.dst_node_id) for message in sent}
    for reply in replies:
        message = by_message.get(reply.metadata.reply_to_message_id)
        if message is not None and not (reply.has_error() and reply.error.code in _LOSSES):
            lost.discard(federation.partition_of(message.metadata.dst_node_id))
    return lost


def left_partitions(
    federation: Federation, sent: Sequence[Message], replies: Iterable[Message]
) -> set[int]:
    """Return the partitions whose node or process is gone, by Flower's word, or was gone, by its own.

    A client that is silent, or that lost its connection to the trunk, may be well.
    """
    partition_ids = {
        m.metadata.message_id: federation.partition_of(m.metadata.dst_node_id) for m in sent
    }
    return {
        partition_ids[reply.metadata.reply_to_message_id]
        for reply in replies
        if reply.has_error()
        and reply.error.code in _ASKED_AGAIN
        and reply.metadata.reply_to_message_id in partition_ids
    }


def by_partition(
    federation: Federation, sent: Sequence[Message], replies: Iterable[Message]
) -> tuple[dict[int, Message], dict[int, str]]:
    """Sort replies by partition into good ones and reasons of failure.

    Args:
        federation: The run's nodes.
        sent: The messages that were sent, after :func:`exchange`.
        replies: Their replies, in any order; missing ones count as failures.

    Returns:
        ``(good, problems)``, both by partition, ascending.
    """
    partition_ids = {message.metadata.message_id: federation.partition_of(message.metadata.dst_node_id)
             for message in sent}  # fmt: skip
    good: dict[int, Message] = {}
    problems = {
        partition_id: "no reply within the deadline" for partition_id in partition_ids.values()
    }
    for reply in replies:
        partition_id = partition_ids.get(reply.metadata.reply_to_message_id)
        if partition_id is None:
            logger.warning("a reply to a message of another phase was ignored")
            continue
        text = failure_text(reply)
        if text:
            problems[partition_id] = text
        else:
            good[partition_id] = reply
            problems.pop(partition_id, None)
    return dict(sorted(good.items())), dict(sorted(problems.items()))
