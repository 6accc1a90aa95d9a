"""What tests of real processes leave behind is finalized here, and not in the middle of a later test."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def leave_no_garbage() -> Iterator[None]:
    """Collect pipes to processes that have ended: closing one gives up the interpreter's lock.

    torch reads the random state with a lock of its own held. Where the collector ran just there and
    closed a pipe, a second thread that wanted the random state waited for ever.
    """
    yield
    gc.collect()
