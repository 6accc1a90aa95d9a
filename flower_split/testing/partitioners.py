"""The contract of a partitioner, checked on rows that its author gives."""

from collections.abc import Mapping, Sequence

from flower_split.config import DataConfig, Scalar
from flower_split.data.partitioner import Partitioner, PartitionRequest
from flower_split.data.tally import Tally
from flower_split.errors import DataError
from flower_split.testing.failures import ConformanceError, require

_SEEDS = (0, 1)


def check_partitioner(
    partitioner: type[Partitioner],
    config: DataConfig,
    columns: Mapping[str, Sequence[object]],
    *,
    num_partitions: int = 3,
    app: Mapping[str, Scalar] | None = None,
) -> None:
    """Check that a partitioner keeps the contract of :class:`flower_split.data.Partitioner`.

    It must be made without arguments, give each partition rows of the data, none of them twice, the
    same when it is asked again, disjoint from every other partition's, and count what nobody gets.

    Args:
        partitioner: The class.
        config: With the settings that it needs.
        columns: Name -> values, one for each row; the longest says how many rows there are.
        num_partitions: Over how many clients the rows are divided.
        app: The run config's keys under ``app.`` that it needs.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.config import DataConfig
        >>> from flower_split.data import Partitioner
        >>> from flower_split.testing import check_partitioner
        >>> class InTurn(Partitioner):
        ...     def rows(self, request):
        ...         return range(request.partition_id, request.num_rows, request.num_partitions)
        >>> check_partitioner(InTurn, DataConfig(), {"text": list("abcdefg")})
    """
    subject = f"partitioner {partitioner.__name__}"
    num_rows = max(map(len, columns.values()))
    for seed in _SEEDS:
        requests = [
            PartitionRequest(
                config=config,
                num_rows=num_rows,
                partition_id=number,
                num_partitions=num_partitions,
                seed=seed,
                column=lambda name: columns[name],
                tally=Tally(),
                app=app or {},
            )
            for number in range(num_partitions)
        ]
        _check_division(partitioner, subject, requests)


def _check_division(
    partitioner: type[Partitioner], subject: str, requests: Sequence[PartitionRequest]
) -> None:
    owner: dict[int, int] = {}
    left_out = []
    for number, request in enumerate(requests):
        rows = _asked(partitioner, subject, request)
        left_out.append(request.tally.result().unassigned_records)
        again = _asked(partitioner, subject, request)
        require(sorted(rows) == sorted(again), subject, "give the same rows when asked again")
        _check_rows(rows, subject, request)
        for row in rows:
            other = owner.setdefault(row, number)
            require(
                other == number,
                subject,
                f"give a row to one partition; row {row} is in {other} and in {number}",
            )
    nobodys = requests[0].num_rows - len(owner)
    require(
        left_out == [nobodys] * len(requests),
        subject,
        f"count in the tally's unassigned_records, for every client, the {nobodys} rows of nobody; "
        f"it counted {left_out}",
    )


def _asked(
    partitioner: type[Partitioner], subject: str, request: PartitionRequest
) -> Sequence[int]:
    try:
        made = partitioner()
    except TypeError as error:
        raise ConformanceError(f"{subject} must be made without arguments: {error}") from error
    try:
        return made.rows(request)
    except DataError as error:
        raise ConformanceError(
            f"{subject} must divide the rows that it is checked with: {error}"
        ) from error


def _check_rows(rows: Sequence[int], subject: str, request: PartitionRequest) -> None:
    number = request.partition_id
    require(len(rows) > 0, subject, f"give partition {number} a row")
    require(len(set(rows)) == len(rows), subject, f"give partition {number} no row twice")
    strange = [row for row in rows if not 0 <= row < request.num_rows]
    require(not strange, subject, f"give rows below {request.num_rows}; it gave {strange}")
