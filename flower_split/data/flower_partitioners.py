"""The partitioners that are built in: those of flwr-datasets.

Rows are shuffled by the seed first, so that partitions by size do not follow the file's order.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from flower_split.data.partitioner import Partitioner, PartitionRequest
from flower_split.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets import partitioner as made


class FlowerPartitioner(Partitioner):
    """One partitioner of flwr-datasets."""

    by_column: ClassVar[bool] = False  # whether it needs data.partition-by

    @abstractmethod
    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it; the settings that the run config has no key for are set here."""

    def rows(self, request: PartitionRequest) -> Sequence[int]:
        """Return the rows of one partition, in ascending order.

        Raises:
            DataError: Its column is missing, it cannot divide the data over so many clients, or would
                leave rows without a client.
        """
        name, count = request.config.partitioner, request.num_partitions
        keys = _keys(request) if self.by_column else []
        rows: list[int] = []
        try:
            found = self.make(request, keys)
            found.dataset = _shuffled_rows(request.num_rows, keys, request.seed)
            available = found.num_partitions
            if request.partition_id < available:
                rows = sorted(found.load_partition(request.partition_id)["row"])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(
                f'partitioner "{name}" cannot divide {request.num_rows} examples over {count} '
                f"clients: {error} Choose another data.partitioner, or other settings of it."
            ) from error
        if request.partition_id >= available:
            raise DataError(
                f'partitioner "{name}" by {request.config.partition_by!r} makes {available} '
                f"partitions, too few for {count} clients. Use at most {available} clients, or another "
                "partitioner."
            )
        if available > count:
            request.tally.add("unassigned_records", _unassigned(found, keys, request))
        return rows


class Iid(FlowerPartitioner):
    """Equal shares of the shuffled rows."""

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import IidPartitioner  # heavy, and only needed here

        return IidPartitioner(request.num_partitions)


class Linear(FlowerPartitioner):
    """Shares in proportion to the partition's number, from 1."""

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import LinearPartitioner

        return LinearPartitioner(request.num_partitions)


class Square(FlowerPartitioner):
    """Shares in proportion to the square of the partition's number, from 1."""

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import SquarePartitioner

        return SquarePartitioner(request.num_partitions)


class Exponential(FlowerPartitioner):
    """Shares that grow exponentially with the partition's number."""

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import ExponentialPartitioner

        return ExponentialPartitioner(request.num_partitions)


class NaturalId(FlowerPartitioner):
    """One value of the column for each client."""

    by_column = True

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import NaturalIdPartitioner

        return NaturalIdPartitioner("key")


class GroupedNaturalId(FlowerPartitioner):
    """Several values of the column for each client, as equal in number as can be."""

    by_column = True

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

        size = -(-len(set(keys)) // request.num_partitions)
        return GroupedNaturalIdPartitioner("key", size, sort_unique_ids=True)


class Dirichlet(FlowerPartitioner):
    """For each value of the column, shares drawn from a Dirichlet distribution."""

    by_column = True

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import DirichletPartitioner

        # flwr-datasets' own floor of 10 rows, lowered where that many are not there
        floor = max(2, min(10, request.num_rows // (4 * request.num_partitions)))
        return DirichletPartitioner(
            request.num_partitions,
            "key",
            request.config.dirichlet_alpha,
            min_partition_size=floor,
            seed=request.seed,
        )


class Shard(FlowerPartitioner):
    """Two shards of the rows, sorted by the column: the experiments of the FedAvg paper."""

    by_column = True

    def make(self, request: PartitionRequest, keys: Sequence[object]) -> "made.Partitioner":
        """Return it."""
        from flwr_datasets.partitioner import ShardPartitioner

        return ShardPartitioner(
            request.num_partitions, "key", num_shards_per_partition=2, seed=request.seed
        )


def _keys(request: PartitionRequest) -> list[object]:
    """Return the values that the rows are divided by.

    Raises:
        DataError: The configuration names no column.
    """
    config = request.config
    if not config.partition_by:
        raise DataError(
            f'data.partition-by must name the column that partitioner "{config.partitioner}" divides '
            "by; it is empty. Name one of the data's columns, or use another partitioner."
        )
    return list(request.column(config.partition_by))


def _shuffled_rows(num_rows: int, keys: Sequence[object], seed: int) -> "Dataset":
    """Return the row numbers as a data set, with their keys where there are any."""
    from datasets import Dataset

    columns: dict[str, list[object]] = {"row": list(range(num_rows))}
    if keys:
        columns["key"] = list(keys)
    return Dataset.from_dict(columns).shuffle(seed=seed)


def _unassigned(
    partitioner: "made.Partitioner", keys: Sequence[object], request: PartitionRequest
) -> int:
    """Count the rows that no client gets, where there are more keys than clients.

    Raises:
        DataError: ``data.on-unassigned`` refuses them.
    """
    config, count = request.config, request.num_partitions
    taken = {partitioner.partition_id_to_natural_id[i] for i in range(count)}
    left_out = sum(key not in taken for key in keys)
    if config.on_unassigned != "refuse":
        return left_out
    raise DataError(
        f'partitioner "{config.partitioner}" gives each client one value of '
        f"{config.partition_by!r}; there are {partitioner.num_partitions} values and {count} "
        f"clients, so {left_out} of {len(keys)} records would be in no client's share. Use "
        'data.partitioner = "grouped-natural-id", which covers all of them; or use as many clients '
        'as values; or set data.on-unassigned = "skip".'
    )
