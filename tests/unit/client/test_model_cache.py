"""What a client's process keeps: models where the config says, and as much data as there is room for."""

from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.client import model_cache
from flower_split.client.client import Client
from flower_split.client.model_cache import RunCache
from flower_split.config import parse_run_config
from tests.support.tiny_app import make_data, make_model, tiny_config

PARTITIONS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> RunCache:
    root: Path = tmp_path_factory.mktemp("cache")
    config = tiny_config(make_model(root / "model"), make_data(root / "data", PARTITIONS))
    return RunCache(parse_run_config(config))


@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_clients_model_is_placed_by_its_device_map(
    compute: str, cache: RunCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []
    load = model_cache.load_client_model

    def note_load(*args: object, **options: object) -> object:
        seen.append(options)
        return load(*args, **options)  # type: ignore[arg-type]

    def note_fast(*args: object, **options: object) -> None:
        seen.append(options)  # nothing is compiled here

    monkeypatch.setattr(model_cache, "load_client_model", note_load)
    monkeypatch.setattr(model_cache, "compute_fast", note_fast)
    train = replace(cache.config.train, device="auto", compute=compute)
    for device_map in ("", "balanced"):
        placed = RunCache(replace(cache.config, train=replace(train, device_map=device_map)))
        client = Client(placed, 0, PARTITIONS)
        assert client.model.training is False
        options, *of_fast = seen
        assert options["device_map"] == (device_map or None)
        assert (options["device"] is None) == bool(device_map)
        graphs = [{"one_at_a_time": not device_map}] if compute == "fast" else []
        assert of_fast == graphs
        seen.clear()


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
