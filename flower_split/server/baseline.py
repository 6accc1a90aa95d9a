"""The local-only baseline: every client trains alone, then every result is tried on every client.

Adapters travel, data never does. The figures answer the question that makes federation worthwhile:
how well does what one client could learn alone serve the other clients' areas?
"""

import logging
from collections.abc import Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flower_split.errors import FederationError
from flower_split.messages.local_only import (
    LocalOnlyEvaluateOrder,
    LocalOnlyEvaluateReply,
    LocalOnlyTrainOrder,
    LocalOnlyTrainReply,
)
from flower_split.runs.summary import HeldOut
from flower_split.server.federation.exchange import by_partition, exchange
from flower_split.server.federation.nodes import Federation, describe
from flower_split.server.recorder import Recorder

logger = logging.getLogger(__name__)


def run_local_only(grid: Grid, federation: Federation, recorder: Recorder) -> None:
    """Train every client alone, and record each result on every client's held-out data.

    Raises:
        FederationError: A client failed.
    """
    logger.info("local-only baseline: every client trains alone, on its own data")
    timeout = recorder.config.round_timeout
    train = LocalOnlyTrainOrder()
    trained = _ask(grid, federation, train.message_type, train.write(), timeout)
    adapters = {
        partition_id: LocalOnlyTrainReply.read(reply.content).adapter
        for partition_id, reply in trained.items()
    }
    logger.info("local-only baseline: every client evaluates all %d adapters", len(adapters))
    order = LocalOnlyEvaluateOrder(adapters)
    replies = _ask(grid, federation, order.message_type, order.write(), timeout)
    for partition_id, reply in replies.items():
        losses = LocalOnlyEvaluateReply.read(reply.content).losses
        for trained_by in adapters:
            if trained_by not in losses:
                raise FederationError(
                    f"the local-only baseline's reply of partition {partition_id} lacks the adapter of "
                    f"partition {trained_by}. Run the same version of flower_split on every machine."
                )
            recorder.local_only(trained_by, partition_id, HeldOut(*losses[trained_by]))


def _ask(
    grid: Grid, federation: Federation, message_type: str, content: RecordDict, timeout: float
) -> Mapping[int, Message]:
    """Send one message to every client; return the replies by partition.

    Raises:
        FederationError: A client failed.
    """
    messages = [
        Message(content, federation.nodes[partition_id], message_type, ttl=timeout + 60.0)
        for partition_id in federation.partition_ids
    ]
    done = 0

    def watch(new: Sequence[Message]) -> bool:
        nonlocal done
        if new:
            done += len(new)
            logger.info("local-only baseline: %d of %d clients done", done, len(messages))
        return False

    replies = exchange(grid, messages, timeout=timeout, watch=watch)
    good, problems = by_partition(federation, messages, replies)
    if problems:
        raise FederationError(
            f"the local-only baseline failed: {describe(problems, federation)}. Fix it, or set "
            "local-only-baseline = false."
        )
    return good
