from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from flower_split.errors import AggregationError
from flower_split.runtime.registry import Registry
from tests.support.distributions import installed, write_distribution

GROUP = "flower_split.animals"


class Animal:
    pass


class Cat(Animal):
    pass


class Dog(Animal):
    pass


def is_animal(found: object) -> TypeGuard[type[Animal]]:
    return isinstance(found, type) and issubclass(found, Animal)


ANIMALS: Registry[type[Animal]] = Registry(
    group=GROUP,
    key="farm.animal",
    form="a subclass of Animal",
    machines="the farm runs",
    built_in={"cat": Cat, "dog": Dog},
    accepts=is_animal,
    error=AggregationError,
)
HORSE = "from tests.unit.runtime.test_registry import Animal\nclass Horse(Animal): pass\nROCK = 3\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    with installed(tmp_path):
        yield tmp_path


def test_a_built_in_is_found_by_name():
    assert ANIMALS.get("dog") is Dog
    assert ANIMALS.names() == ["cat", "dog"]


def test_a_distribution_adds_a_name(site: Path):
    write_distribution(
        site,
        "horses",
        entry_points={GROUP: {"horse": "horse_module:Horse"}},
        modules={"horse_module": HORSE},
    )
    assert ANIMALS.get("horse").__name__ == "Horse"
    assert ANIMALS.names() == ["cat", "dog", "horse"]
    assert ANIMALS.origins() == {
        "cat": "built in",
        "dog": "built in",
        "horse": "distribution horses 1.0",
    }


def test_an_unknown_name_gives_the_nearest_all_known_and_how_to_add_one():
    with pytest.raises(AggregationError) as refusal:
        ANIMALS.get("dgo")
    message = str(refusal.value)
    assert "farm.animal 'dgo' is unknown; it must be one of cat, dog." in message
    assert "Did you mean 'dog'?" in message
    assert GROUP in message and "a subclass of Animal" in message and "the farm runs" in message


def test_a_plugin_that_cannot_be_imported_is_named_with_its_distribution(site: Path):
    write_distribution(
        site,
        "broken-horses",
        entry_points={GROUP: {"horse": "broken_horse:Horse"}},
        modules={"broken_horse": "import a_module_that_is_not_there"},
    )
    with pytest.raises(
        AggregationError, match=r"distribution broken-horses 1\.0.*ModuleNotFoundError"
    ):
        ANIMALS.get("horse")
    assert ANIMALS.get("cat") is Cat  # it stops nobody else


def test_a_plugin_that_takes_a_built_in_name_is_refused(site: Path):
    write_distribution(site, "other-cats", entry_points={GROUP: {"cat": "anything:Cat"}})
    with pytest.raises(
        AggregationError, match=r"'cat' is claimed by flower_split itself and by dist"
    ):
        ANIMALS.get("cat")
    assert ANIMALS.get("dog") is Dog
    assert ANIMALS.origins()["cat"] == "built in, distribution other-cats 1.0"


def test_two_plugins_of_one_name_are_refused_by_name(site: Path):
    for name in ("red-horses", "blue-horses"):
        write_distribution(site, name, entry_points={GROUP: {"horse": "anything:Horse"}})
    with pytest.raises(AggregationError) as refusal:
        ANIMALS.get("horse")
    assert "red-horses 1.0" in str(refusal.value) and "blue-horses 1.0" in str(refusal.value)


def test_an_import_path_needs_no_distribution(site: Path):
    (site / "wild_horse.py").write_text(HORSE)
    assert ANIMALS.get("wild_horse:Horse").__name__ == "Horse"
    with pytest.raises(AggregationError, match=r"must be a subclass of Animal; it is 3"):
        ANIMALS.get("wild_horse:ROCK")
    with pytest.raises(AggregationError, match=r"'wild_horse:Pony'.*AttributeError.*the farm runs"):
        ANIMALS.get("wild_horse:Pony")
    with pytest.raises(AggregationError, match=r"ModuleNotFoundError"):
        ANIMALS.get("no_such_module:Horse")


def test_a_plugin_of_another_form_is_refused(site: Path):
    write_distribution(
        site,
        "rocks",
        entry_points={GROUP: {"rock": "rock_module:ROCK"}},
        modules={"rock_module": HORSE},
    )
    with pytest.raises(
        AggregationError, match=r"'rock' of distribution rocks 1\.0 must be a subclass"
    ):
        ANIMALS.get("rock")
