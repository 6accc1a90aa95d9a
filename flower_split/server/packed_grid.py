"""A Flower grid whose messages travel packed to the nodes that understand it."""

import copy
import logging
from collections.abc import Collection, Iterable

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flower_split.errors import FederationError
from flower_split.messages.arrays import check_readable
from flower_split.messages.packing import packed, unpacked
from flower_split.server.wrapped_grid import WrappedGrid

logger = logging.getLogger(__name__)


class PackedGrid(WrappedGrid):
    """``grid``, with each record of arrays as one array on its way; see ``messages/packing.py``.

    Args:
        grid: Flower's.
        nodes: The nodes that understand it, as they said in the handshake. They answer packed messages
            packed.
    """

    def __init__(self, grid: Grid, nodes: Collection[int]) -> None:
        super().__init__(grid)
        self._nodes = frozenset(nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; they get their ids, as the packed ones share their metadata."""
        return self._grid.push_messages(
            [packed(m) if m.metadata.dst_node_id in self._nodes else m for m in messages]
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch replies; one whose arrays cannot be read is its node's failure."""
        return [_unpacked(reply) for reply in self._grid.pull_messages(message_ids)]


def _unpacked(reply: Message) -> Message:
    if not reply.has_content():
        return reply
    try:
        whole = unpacked(reply)
        for name, record in whole.content.array_records.items():
            check_readable(record, f"record {name!r}")
    except FederationError as error:
        logger.warning("the reply of node %d: %s", reply.metadata.src_node_id, error)
        failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
        refused = copy.copy(reply)
        vars(refused).update(_content=None, _error=failed)  # with its metadata
        return refused
    return whole
