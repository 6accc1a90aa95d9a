"""Partitions: disjoint, complete, repeatable, and divided by what they say."""

import pytest

from flower_split.config import DataConfig
from flower_split.data.partitions import partition_rows
from flower_split.data.tally import Tally
from flower_split.errors import DataError

KEYS = [str(5 - row % 6) for row in range(120)]


def _partition(name: str, number: int, count: int = 3, seed: int = 0) -> list[int]:
    config = DataConfig(partitioner=name, partition_by="key")
    return partition_rows(
        lambda column: KEYS if column == "key" else [],
        len(KEYS),
        config,
        seed=seed,
        partition_id=number,
        num_partitions=count,
    )


@pytest.mark.parametrize(
    "name",
    [
        "iid",
        "linear",
        "square",
        "exponential",
        "dirichlet",
        "grouped-natural-id",
        "shard",
    ],
)
@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # pyarrow's own
def test_partitions_are_disjoint_and_complete(name: str) -> None:
    parts = [_partition(name, number) for number in range(3)]
    assert sorted(sum(parts, [])) == list(range(120))
    assert all(parts) and all(part == sorted(part) for part in parts)
    assert parts == [_partition(name, number) for number in range(3)]


def test_partitions_by_size_follow_their_law_and_the_seed() -> None:
    assert [len(_partition("iid", i)) for i in range(3)] == [40, 40, 40]
    assert [len(_partition("linear", i)) for i in range(3)] == [20, 40, 60]
    assert _partition("iid", 0, seed=0) != _partition("iid", 0, seed=1)
    assert _partition("iid", 0) != list(range(40))  # not in the file's order


def test_partitions_by_natural_id_hold_one_key_each() -> None:
    for number in range(6):
        assert {KEYS[row] for row in _partition("natural-id", number, 6)} == {str(number)}
    groups = [{KEYS[row] for row in _partition("grouped-natural-id", i)} for i in range(3)]
    assert groups == [{"0", "1"}, {"2", "3"}, {"4", "5"}]


def test_partitions_by_dirichlet_are_skewed() -> None:
    shares = [
        [_partition("dirichlet", i).count(row) for row in range(120) if KEYS[row] == "0"]
        for i in range(3)
    ]
    counts = [sum(share) for share in shares]
    assert sum(counts) == 20 and max(counts) - min(counts) > 6


def test_partitioner_none_leaves_every_client_the_whole_file() -> None:
    assert _partition("none", 2) == list(range(120))


def test_partitioner_unknown_lists_the_known() -> None:
    with pytest.raises(DataError, match="dirichlet.*natural-id.*it is 'iidd'"):
        _partition("iidd", 0)


def test_partitioner_without_its_column_is_refused() -> None:
    with pytest.raises(DataError, match="data.partition-by must name the column"):
        partition_rows(
            lambda _: [],
            9,
            DataConfig(partitioner="natural-id"),
            seed=0,
            partition_id=0,
            num_partitions=2,
        )


def test_partitions_more_than_there_are_ids_are_refused() -> None:
    with pytest.raises(DataError, match="makes 6 partitions, too few for 8 clients"):
        _partition("natural-id", 7, 8)


def test_partitions_more_than_there_are_rows_are_refused() -> None:
    with pytest.raises(DataError, match="120 examples are to be divided over 121"):
        _partition("iid", 0, 121)


def test_partitioner_that_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(DataError, match='"natural-id" cannot divide 2 examples over 2'):
        partition_rows(
            lambda _: ["a", None],
            2,
            DataConfig(partitioner="natural-id", partition_by="key"),
            seed=0,
            partition_id=0,
            num_partitions=2,
        )


def test_partitions_by_natural_id_that_leave_records_out_are_refused_or_counted() -> None:
    with pytest.raises(
        DataError, match="6 values and 4 clients, so 40 of 120 records.*grouped-natural-id"
    ):
        _partition("natural-id", 0, 4)
    tally = Tally()
    rows = partition_rows(
        lambda _: KEYS,
        len(KEYS),
        DataConfig(partitioner="natural-id", partition_by="key", on_unassigned="skip"),
        seed=0,
        partition_id=1,
        num_partitions=4,
        tally=tally,
    )
    assert {KEYS[row] for row in rows} == {"1"}
    assert tally.result().unassigned_records == 40
