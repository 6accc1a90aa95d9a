"""Loading modules with the collector out of the way."""

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from flower_split.runtime.loading import loading_modules


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_nothing_is_collected_in_the_block_and_everything_after_it() -> None:
    with loading_modules():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0  # a few modules are no reason


def test_what_a_thousand_modules_left_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with loading_modules():
        for number in range(1000):
            monkeypatch.setitem(sys.modules, f"made_up_{number}", ModuleType("made_up"))
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000


def test_collector_that_was_off_stays_off_even_after_an_error() -> None:
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), loading_modules():
            _ = 1 / 0
        assert not gc.isenabled()
    finally:
        gc.enable()
