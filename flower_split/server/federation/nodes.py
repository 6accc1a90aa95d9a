"""Which Flower node holds which data partition, and failures in words that name both.

A *partition id* names a client's data: the stable name under which the trunk, the strategy and
the reports know it. Flower's node id changes from run to run. :class:`Federation` maps the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flower_split.errors import FederationError


@dataclass(frozen=True, slots=True)
class Federation:
    """Map partitions to nodes; fixed for a run.

    Args:
        nodes: Partition id to Flower node id, ascending in the partition.
        left_out: Partition to why a client takes no part, of those that are there and have too little
            data.
    """

    nodes: Mapping[int, int]
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def partition_ids(self) -> list[int]:
        """Return all partitions, ascending."""
        return sorted(self.nodes)

    def partition_of(self, node_id: int) -> int:
        """Return the partition of a node.

        Raises:
            FederationError: The node did not take part in the handshake.
        """
        for partition_id, known in self.nodes.items():
            if known == node_id:
                return partition_id
        raise FederationError(
            f"node {node_id} joined after the run began; it holds no partition of this run. "
            "Start a new run to include it."
        )


def describe(problems: Mapping[int, str], federation: Federation) -> str:
    """Return reasons of failure as one paragraph; equal texts appear once, with all their partitions."""
    return "; ".join(
        f"partition{'s' if len(partition_ids) > 1 else ''} "
        + ", ".join(
            f"{partition_id} (node {federation.nodes[partition_id]})"
            for partition_id in partition_ids
        )
        + f": {text}"
        for text, partition_ids in _by_text(problems).items()
    )


def describe_nodes(problems: Mapping[int, str], federation: Federation) -> str:
    """Return the same paragraph as :func:`describe` by node ids, before the partitions are known."""
    return "; ".join(
        f"node{'s' if len(partition_ids) > 1 else ''} "
        + ", ".join(str(federation.nodes[partition_id]) for partition_id in partition_ids)
        + f": {text}"
        for text, partition_ids in _by_text(problems).items()
    )


def _by_text(problems: Mapping[int, str]) -> dict[str, list[int]]:
    by_text: dict[str, list[int]] = {}
    for partition_id, text in sorted(problems.items()):
        by_text.setdefault(text, []).append(partition_id)
    return by_text
