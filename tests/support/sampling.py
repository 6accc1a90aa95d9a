"""Parameters of which a sample runs always, and all with ``-m slow`` too."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet


def sampled(names: Iterable[str], *always: str) -> "list[str | ParameterSet]":
    """Return ``names`` as parameters; those that are not in ``always`` are marked slow."""
    every = list(names)
    assert set(always) <= set(every), f"{always} are not all among {every}"
    return [
        name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in every
    ]
