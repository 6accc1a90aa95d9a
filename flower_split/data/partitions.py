"""One data set over several simulated clients, by the partitioners of flwr-datasets."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flower_split.config import DataConfig
from flower_split.data.tally import Tally
from flower_split.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

BY_COLUMN = ("dirichlet", "grouped-natural-id", "natural-id", "shard")
"""Partitioners that need ``data.partition-by``."""

BY_SIZE = ("exponential", "iid", "linear", "square")
"""Partitioners that need only the number of rows."""

NONE = "none"
"""No partitioner: every client reads all of the file it finds at the path, its own."""


def partition_rows(
    column: Callable[[str], Sequence[object]],
    num_rows: int,
    config: DataConfig,
    *,
    seed: int,
    partition_id: int,
    num_partitions: int,
    tally: Tally | None = None,
) -> list[int]:
    """Return the rows of one partition, in ascending order.

    Rows are shuffled by ``seed`` first, so that partitions by size do not follow the file's order.
    Partitions are disjoint, and the same for every client that asks with the same arguments.

    Args:
        column: Gives a column's values, one per row; asked for ``config.partition_by`` alone.
        num_rows: Rows of the whole data set.
        config: Its ``partitioner``, ``partition_by`` and ``dirichlet_alpha`` are used.
        seed: The run's seed.
        partition_id: Which partition, from 0.
        num_partitions: How many there are.
        tally: Counts the rows that no client gets, where the config lets them be left out.

    Raises:
        DataError: The partitioner is unknown, its column is missing, it cannot divide the data
            over so many clients, or would leave rows without a client.
    """
    name = config.partitioner
    _check_known(name)
    if name == NONE or num_partitions == 1:
        return list(range(num_rows))
    if num_rows < num_partitions:
        raise DataError(
            f"every client needs at least one example; {num_rows} examples are to be divided over "
            f"{num_partitions} clients. Use more data or fewer clients."
        )
    keys = _keys(column, config) if name in BY_COLUMN else []
    try:
        partitioner = _partitioner(config, keys, num_rows, num_partitions, seed)
        partitioner.dataset = _shuffled_rows(num_rows, keys, seed)
        available = partitioner.num_partitions
        rows: list[int] = []
        if partition_id < available:
            rows = sorted(partitioner.load_partition(partition_id)["row"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f'partitioner "{name}" cannot divide {num_rows} examples over {num_partitions} '
            f"clients: {error} Choose another data.partitioner, or other settings of it."
        ) from error
    if partition_id >= available:
        raise DataError(
            f'partitioner "{name}" by {config.partition_by!r} makes {available} partitions, too few '
            f"for {num_partitions} clients. Use at most {available} clients, or another partitioner."
        )
    if available > num_partitions:
        left_out = _unassigned(partitioner, keys, config, num_partitions)
        (tally or Tally()).add("unassigned_records", left_out)
    return rows


def _check_known(name: str) -> None:
    """Check that there is a partitioner of this name.

    Raises:
        DataError: There is none.
    """
    if name not in (NONE, *BY_COLUMN, *BY_SIZE):
        raise DataError(
            f"data.partitioner must be one of {', '.join(sorted((NONE, *BY_COLUMN, *BY_SIZE)))}; "
            f"it is {name!r}."
        )


def _keys(column: Callable[[str], Sequence[object]], config: DataConfig) -> list[object]:
    """Return the values that the rows are divided by.

    Raises:
        DataError: The configuration names no column.
    """
    if not config.partition_by:
        raise DataError(
            f'data.partition-by must name the column that partitioner "{config.partitioner}" divides '
            "by; it is empty. Name one of the data's columns, or use another partitioner."
        )
    return list(column(config.partition_by))


def _shuffled_rows(num_rows: int, keys: Sequence[object], seed: int) -> "Dataset":
    """Return the row numbers as a data set, with their keys where there are any."""
    from datasets import Dataset  # heavy, and only needed here

    columns: dict[str, list[object]] = {"row": list(range(num_rows))}
    if keys:
        columns["key"] = list(keys)
    return Dataset.from_dict(columns).shuffle(seed=seed)


def _unassigned(
    partitioner: "Partitioner", keys: Sequence[object], config: DataConfig, num_partitions: int
) -> int:
    """Count the rows that no client gets, where there are more keys than clients.

    Raises:
        DataError: ``data.on-unassigned`` refuses them.
    """
    taken = {partitioner.partition_id_to_natural_id[i] for i in range(num_partitions)}
    left_out = sum(key not in taken for key in keys)
    if config.on_unassigned != "refuse":
        return left_out
    raise DataError(
        f'partitioner "{config.partitioner}" gives each client one value of '
        f"{config.partition_by!r}; there are {partitioner.num_partitions} values and "
        f"{num_partitions} clients, so {left_out} of {len(keys)} records would be in no client's "
        'share. Use data.partitioner = "grouped-natural-id", which covers all of them; or use as '
        'many clients as values; or set data.on-unassigned = "skip".'
    )


def _partitioner(
    config: DataConfig,
    keys: Sequence[object],
    num_rows: int,
    num_partitions: int,
    seed: int,
) -> "Partitioner":
    """Return the partitioner that ``config`` names; the settings it has no key for are set here."""
    from flwr_datasets import partitioner as made  # heavy, and only needed here

    count = num_partitions
    match config.partitioner:
        case "iid":
            return made.IidPartitioner(count)
        case "linear":
            return made.LinearPartitioner(count)
        case "square":
            return made.SquarePartitioner(count)
        case "exponential":
            return made.ExponentialPartitioner(count)
        case "natural-id":
            return made.NaturalIdPartitioner("key")
        case "grouped-natural-id":
            size = -(-len(set(keys)) // count)
            return made.GroupedNaturalIdPartitioner("key", size, sort_unique_ids=True)
        case "dirichlet":
            # flwr-datasets' own floor of 10 rows, lowered where that many are not there
            floor = max(2, min(10, num_rows // (4 * count)))
            return made.DirichletPartitioner(
                count, "key", config.dirichlet_alpha, min_partition_size=floor, seed=seed
            )
        case "shard":
            # two shards per client, as in the experiments of the FedAvg paper
            return made.ShardPartitioner(count, "key", num_shards_per_partition=2, seed=seed)
    raise DataError(
        f"data.partitioner {config.partitioner!r} is unknown. Use one of "
        f"{', '.join(sorted((NONE, *BY_COLUMN, *BY_SIZE)))}."
    )
