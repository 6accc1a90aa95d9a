"""A Flower grid that shows only some of the nodes, so that an inner strategy sees a seeded sample."""

from collections.abc import Iterable, Sequence

from flwr.serverapp import Grid

from flower_split.errors import FederationError
from flower_split.server.wrapped_grid import WrappedGrid

_MAX_QUERIES = 4  # a strategy that asks more often waits for nodes that never come


class NodeView(WrappedGrid):
    """``grid``, restricted to ``nodes``; everything else passes through.

    Flower's strategies wait without an end for more nodes than they see. Here the wait ends in an
    error that names the remedy.

    Args:
        grid: The real grid.
        nodes: Node ids, in the order in which the strategy shall see them.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        super().__init__(grid)
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
