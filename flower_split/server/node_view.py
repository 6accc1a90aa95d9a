"""A Flower grid that shows only some of the nodes, so that an inner strategy sees a seeded sample."""

from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from flower_split.errors import FederationError

_MAX_QUERIES = 4  # a strategy that asks more often waits for nodes that never come


class NodeView(Grid):
    """``grid``, restricted to ``nodes``; everything else passes through.

    Flower's strategies wait without an end for more nodes than they see. Here the wait ends in an
    error that names the remedy.

    Args:
        grid: The real grid.
        nodes: Node ids, in the order in which the strategy shall see them.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid = grid
        self._nodes = list(nodes)
        self._queries = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the chosen nodes.

        Raises:
            FederationError: The strategy keeps asking: it waits for more nodes than there are.
        """
        self._queries += 1
        if self._queries > _MAX_QUERIES:
            raise FederationError(
                f"the inner strategy waits for more nodes than the {len(self._nodes)} that take "
                "part in this phase. Give it fraction_train=1.0, fraction_evaluate=1.0 and "
                "min_train_nodes, min_evaluate_nodes, min_available_nodes of 1; the run config "
                "samples the clients."
            )
        return list(self._nodes)

    def set_run(self, run: Run) -> None:
        """Pass through."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Pass through."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass through."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass through."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass through."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass through."""
        return self._grid.send_and_receive(messages, timeout=timeout)
