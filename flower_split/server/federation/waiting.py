"""Wait for clients that a lost round has not heard of, before another attempt is spent on them.

A SuperNode that was killed counts as online for about a minute, and its successor is refused as long.
A round that begins meanwhile is lost at once. So whoever gave no answer is asked until it answers: a
query is proof that its SuperNode is back, and that its ClientApp starts.
"""

import logging
import time
from collections.abc import Callable, Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from flower_split.errors import FederationError
from flower_split.messages.orders import HandshakeOrder
from flower_split.server.federation.exchange import by_partition, exchange
from flower_split.server.federation.nodes import Federation, describe

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 5.0  # between two questions, where Flower says at once that a node is not there


def _nothing(partition_id: int, reply: Message) -> None:
    pass


def wait_for_clients(
    grid: Grid,
    missing: Mapping[int, int],
    seconds: float,
    *,
    answered: Callable[[int, Message], None] = _nothing,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Ask clients until each has answered.

    Args:
        grid: Flower's grid.
        missing: Partition to node of those that a lost round has not heard of.
        seconds: How long to wait in all.
        answered: Called with each partition and its answer to a handshake.
        pause: Waits between two questions.

    Raises:
        FederationError: One has not answered in time; names it with its node.
    """
    left, problems = dict(missing), {partition_id: "no answer" for partition_id in missing}
    deadline = time.monotonic() + seconds
    while left:
        federation = Federation(left)
        logger.warning(
            "waiting for %s, %.0f s at most", _named(left), max(deadline - time.monotonic(), 0.0)
        )
        messages = [
            Message(HandshakeOrder().write(), node, MessageType.QUERY, ttl=seconds + 60.0)
            for node in left.values()
        ]
        replies = exchange(grid, messages, timeout=max(deadline - time.monotonic(), 1.0))
        good, problems = by_partition(federation, messages, replies)
        for partition_id, reply in good.items():
            answered(partition_id, reply)
        if good:
            logger.info(
                "%s: connected again",
                _named({partition_id: left[partition_id] for partition_id in good}),
            )
        left = {
            partition_id: node for partition_id, node in left.items() if partition_id not in good
        }
        if left and time.monotonic() >= deadline:
            raise FederationError(
                f"{describe(problems, federation)}. They left the run, and did not come back within "
                f"{seconds:g} s (join-timeout). Start their SuperNodes again (one that was killed is let "
                "in after 65 s), then resume the run."
            )
        if left:
            pause(_PAUSE_SECONDS)


def _named(nodes: Mapping[int, int]) -> str:
    return ", ".join(
        f"partition {partition_id} (node {node})" for partition_id, node in sorted(nodes.items())
    )
