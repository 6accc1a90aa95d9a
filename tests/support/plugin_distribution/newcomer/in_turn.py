"""A partitioner: rows are dealt out in turn, beginning with the last client."""

from collections.abc import Sequence

from flower_split.data import Partitioner, PartitionRequest


class InTurn(Partitioner):
    """Give every client each of so many rows as there are clients."""

    def rows(self, request: PartitionRequest) -> Sequence[int]:
        """See :class:`Partitioner`."""
        first = request.num_partitions - 1 - request.partition_id
        return range(first, request.num_rows, request.num_partitions)
