"""The first pause of Flower's pulls: shorter in this process, and left alone where there is none."""

import importlib
import time
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from flower_split.runtime.flower_pulls import pull_sooner

UTILS = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    functions = (UTILS.pull_objects, UTILS.pull_and_inflate_object_from_tree)
    before = [dict(function.__kwdefaults__) for function in functions]
    yield
    for function, named in zip(functions, before, strict=True):
        function.__kwdefaults__.update(named)


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


def test_a_clients_whole_message_that_comes_a_moment_later_is_there_in_a_moment() -> None:
    content = ConfigRecord({"a": 1})
    sent, asked = {content.object_id: content.deflate()}, []

    def pull(name: str) -> bytes:
        asked.append(name)
        if len(asked) < 3:
            raise UTILS.ObjectUnavailableError(name)
        return sent[name]

    assert pull_sooner()
    begun = time.monotonic()
    tree = get_object_tree(content)
    came = UTILS.pull_and_inflate_object_from_tree(
        tree, pull, lambda _: None, return_type=ConfigRecord
    )
    assert came == content and time.monotonic() - begun < 0.5


@pytest.mark.parametrize("module", ["flwr.no_such_module", "json"])
def test_release_of_flower_without_that_default_is_left_as_it_is(module: str) -> None:
    assert not pull_sooner(module)
