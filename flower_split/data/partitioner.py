"""What a partitioner is: it says which rows of one data set belong to one client.

Next: ``flower_split/data/flower_partitioners.py``, those that are built in.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flower_split.config import DataConfig, Scalar
from flower_split.data.tally import Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRequest:
    """What a partitioner is asked for, the same for every call on behalf of one client."""

    config: DataConfig
    num_rows: int  # of the whole data set, at least num_partitions
    partition_id: int  # from 0
    num_partitions: int  # at least 2
    seed: int  # the run's
    column: Callable[[str], Sequence[object]]  # a column's values, one for each row
    tally: Tally  # rows that no client gets are counted as its unassigned_records
    app: Mapping[str, Scalar] = field(default_factory=dict)  # the run config's keys under "app."


class Partitioner(ABC):
    """Who owns which row; register one in the entry-point group ``flower_split.partitioners``.

    An instance is made without arguments for each client and asked once, in that client's process.
    Everything random must come from the request's seed, so that all clients see one division.
    """

    @abstractmethod
    def rows(self, request: PartitionRequest) -> Sequence[int]:
        """Return the rows of one partition, each once, in any order.

        Partitions of one division are disjoint.

        Raises:
            DataError: The data cannot be divided so; says why and what to do.
        """
