"""What a client's process keeps: the data of those that it served last, as much as there is room for."""

from pathlib import Path

import pytest

from flower_split.client import model_cache
from flower_split.client.model_cache import RunCache
from flower_split.config import parse_run_config
from tests.support.tiny_app import make_data, make_model, tiny_config

PARTITIONS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> RunCache:
    root: Path = tmp_path_factory.mktemp("cache")
    config = tiny_config(make_model(root / "model"), make_data(root / "data", PARTITIONS))
    return RunCache(parse_run_config(config))


def test_data_of_all_partitions_is_loaded_once_where_there_is_room(cache: RunCache) -> None:
    first = [cache.data(slot, PARTITIONS) for slot in range(PARTITIONS)]
    again = [cache.data(slot, PARTITIONS) for slot in range(PARTITIONS)]
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_data_used_longest_ago_goes_first_and_the_last_one_stays(
    cache: RunCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = sum(model_cache._ids(cache.data(slot, PARTITIONS)) for slot in range(PARTITIONS))
    monkeypatch.setattr(model_cache, "MOST_IDS", everything - 1)
    other = RunCache(cache.config)
    for slot in (0, 1, 0, 2):
        other.data(slot, PARTITIONS)
    assert [slot for slot, _ in other._data] == [0, 2]
    monkeypatch.setattr(model_cache, "MOST_IDS", 0)
    other.data(1, PARTITIONS)
    assert [slot for slot, _ in other._data] == [1]
    assert other.data(1, PARTITIONS) is other.data(1, PARTITIONS)
