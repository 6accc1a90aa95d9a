"""Partitions: disjoint, complete, repeatable, and divided by what they say."""

from collections.abc import Sequence

import pytest

from flower_split.config import DataConfig
from flower_split.data.partitioner import Partitioner, PartitionRequest
from flower_split.data.partitions import BUILT_IN, partition_rows
from flower_split.data.tally import Tally
from flower_split.errors import ConfigError, DataError
from flower_split.testing import ConformanceError, check_partitioner

KEYS = [str(5 - row % 6) for row in range(120)]


def _partition(name: str, number: int, count: int = 3, seed: int = 0) -> list[int]:
    config = DataConfig(partitioner=name, partition_by="key")
    return partition_rows(_request(config, number, count, seed=seed))


def _request(
    config: DataConfig,
    number: int,
    count: int,
    *,
    keys: Sequence[object] = KEYS,
    seed: int = 0,
    tally: Tally | None = None,
) -> PartitionRequest:
    return PartitionRequest(
        config=config,
        num_rows=len(keys),
        partition_id=number,
        num_partitions=count,
        seed=seed,
        column=lambda column: keys if column == "key" else [],
        tally=tally or Tally(),
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
    words = "data.partitioner 'iidd' is unknown.*dirichlet.*natural-id.*Did you mean 'iid'"
    with pytest.raises(ConfigError, match=words):
        _partition("iidd", 0)


def test_partitioner_without_its_column_is_refused() -> None:
    with pytest.raises(DataError, match="data.partition-by must name the column"):
        partition_rows(_request(DataConfig(partitioner="natural-id"), 0, 2))


def test_partitions_more_than_there_are_ids_are_refused() -> None:
    with pytest.raises(DataError, match="makes 6 partitions, too few for 8 clients"):
        _partition("natural-id", 7, 8)


def test_partitions_more_than_there_are_rows_are_refused() -> None:
    with pytest.raises(DataError, match="120 examples are to be divided over 121"):
        _partition("iid", 0, 121)


def test_partitioner_that_fails_is_reported_with_its_reason() -> None:
    with pytest.raises(DataError, match='"natural-id" cannot divide 2 examples over 2'):
        config = DataConfig(partitioner="natural-id", partition_by="key")
        partition_rows(_request(config, 0, 2, keys=["a", None]))


def test_partitions_by_natural_id_that_leave_records_out_are_refused_or_counted() -> None:
    with pytest.raises(
        DataError, match="6 values and 4 clients, so 40 of 120 records.*grouped-natural-id"
    ):
        _partition("natural-id", 0, 4)
    tally = Tally()
    config = DataConfig(partitioner="natural-id", partition_by="key", on_unassigned="skip")
    rows = partition_rows(_request(config, 1, 4, tally=tally))
    assert {KEYS[row] for row in rows} == {"1"}
    assert tally.result().unassigned_records == 40


class InTurn(Partitioner):
    """Rows in turn; what is broken is in its subclasses."""

    def rows(self, request: PartitionRequest) -> Sequence[int]:
        return range(request.partition_id, request.num_rows, request.num_partitions)


class Everybodys(InTurn):
    def rows(self, request: PartitionRequest) -> Sequence[int]:
        return [*super().rows(request), 0] if request.partition_id else super().rows(request)


class Twice(InTurn):
    def rows(self, request: PartitionRequest) -> Sequence[int]:
        return [*super().rows(request), request.partition_id]


class Beyond(InTurn):
    def rows(self, request: PartitionRequest) -> Sequence[int]:
        return [*super().rows(request), request.num_rows]


class Drops(InTurn):
    def rows(self, request: PartitionRequest) -> Sequence[int]:
        return list(super().rows(request))[1:]


class Fickle(InTurn):
    asked = 0

    def rows(self, request: PartitionRequest) -> Sequence[int]:
        Fickle.asked += 1
        return list(super().rows(request))[Fickle.asked % 2 :]


def test_partitioner_by_import_path_divides_the_rows() -> None:
    path = f"{__name__}:InTurn"
    assert [_partition(path, number)[:3] for number in range(3)] == [
        [0, 3, 6],
        [1, 4, 7],
        [2, 5, 8],
    ]
    with pytest.raises(ConfigError, match="must be a subclass of flower_split.data.Partitioner"):
        _partition(f"{__name__}:KEYS", 0)


@pytest.mark.parametrize(
    ("name", "words"), [("Twice", "a row twice"), ("Beyond", "gives partition 0 120")]
)
def test_rows_that_are_not_there_or_come_twice_are_refused(name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        _partition(f"{__name__}:{name}", 0)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "none"])
@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # pyarrow's own
def test_built_in_partitioners_keep_the_contract(name: str) -> None:
    config = DataConfig(partitioner=name, partition_by="key", on_unassigned="skip")
    check_partitioner(BUILT_IN[name], config, {"key": KEYS})


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Everybodys, "row 0 is in 0 and in 1"),
        (Twice, "no row twice"),
        (Beyond, "give rows below 120"),
        (Drops, "the 3 rows of nobody"),
        (Fickle, "same rows when asked again"),
    ],
)
def test_conformance_names_the_clause_that_a_partitioner_breaks(
    broken: type[Partitioner], words: str
) -> None:
    check_partitioner(InTurn, DataConfig(), {"key": KEYS})
    with pytest.raises(ConformanceError, match=f"partitioner {broken.__name__} must .*{words}"):
        check_partitioner(broken, DataConfig(), {"key": KEYS})
