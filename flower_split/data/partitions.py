"""One data set over several clients: partitioners by name, and the rows of one client."""

from types import MappingProxyType
from typing import TypeGuard

from flower_split.data import flower_partitioners as flower
from flower_split.data.partitioner import Partitioner, PartitionRequest
from flower_split.errors import DataError
from flower_split.runtime.registry import Registry


class Undivided(Partitioner):
    """No division: every client reads all of the file it finds at the path, its own."""

    def rows(self, request: PartitionRequest) -> range:
        """Return every row."""
        return range(request.num_rows)


NONE = "none"
"""The name of :class:`Undivided`."""

BUILT_IN: dict[str, type[Partitioner]] = {
    "iid": flower.Iid,
    "dirichlet": flower.Dirichlet,
    "natural-id": flower.NaturalId,
    "grouped-natural-id": flower.GroupedNaturalId,
    "shard": flower.Shard,
    "linear": flower.Linear,
    "square": flower.Square,
    "exponential": flower.Exponential,
    NONE: Undivided,
}


def _is_partitioner(found: object) -> TypeGuard[type[Partitioner]]:
    return isinstance(found, type) and issubclass(found, Partitioner)


PARTITIONERS: Registry[type[Partitioner]] = Registry(
    group="flower_split.partitioners",
    key="data.partitioner",
    form="a subclass of flower_split.data.Partitioner",
    machines="the clients run",
    built_in=MappingProxyType(BUILT_IN),
    accepts=_is_partitioner,
)


def partition_rows(request: PartitionRequest) -> list[int]:
    """Return the rows of one partition, in ascending order.

    Partitions are disjoint, and the same for every client that asks with the same request. One
    client has every row.

    Raises:
        ConfigError: The partitioner is unknown.
        DataError: It cannot divide the data so, or gave rows that are not there, or one twice.
    """
    name = request.config.partitioner
    partitioner = PARTITIONERS.get(name)()
    if request.num_partitions == 1:
        return list(range(request.num_rows))
    if name != NONE and request.num_rows < request.num_partitions:
        raise DataError(
            f"every client needs at least one example; {request.num_rows} examples are to be divided "
            f"over {request.num_partitions} clients. Use more data or fewer clients."
        )
    rows = list(partitioner.rows(request))
    wrong = next((row for row in rows if not 0 <= row < request.num_rows), None)
    if wrong is not None or len(set(rows)) < len(rows):
        raise DataError(
            f"a partitioner must give rows from 0 to {request.num_rows - 1}, each once; {name!r} gives "
            f"partition {request.partition_id} {'a row twice' if wrong is None else wrong}. Correct the "
            "plug-in."
        )
    return sorted(rows)
