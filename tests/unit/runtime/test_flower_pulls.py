"""The first pause of Flower's pulls: shorter in this process, and left alone where there is none."""

import importlib
import time
from collections.abc import Iterator

import pytest

from flower_split.runtime.flower_pulls import pull_sooner

UTILS = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = dict(UTILS.pull_objects.__kwdefaults__)
    yield
    UTILS.pull_objects.__kwdefaults__.update(before)


def test_an_object_that_comes_a_moment_later_is_there_in_a_moment() -> None:
    asked: list[str] = []

    def pull(name: str) -> bytes:
        asked.append(name)
        if len(asked) < 3:
            raise UTILS.ObjectUnavailableError(name)
        return b"there"

    assert pull_sooner()
    begun = time.monotonic()
    assert UTILS.pull_objects(["a"], pull) == {"a": b"there"}
    assert time.monotonic() - begun < 0.5  # with Flower's own pauses: three seconds
    assert pull_sooner()  # once more changes nothing


@pytest.mark.parametrize("module", ["flwr.no_such_module", "json"])
def test_release_of_flower_without_that_default_is_left_as_it_is(module: str) -> None:
    assert not pull_sooner(module)
