"""For all tests: one CPU thread, no failpoint left on, an origin for Flower's messages.

With ``-n auto`` the tests of a file run in one process (``--dist loadfile``), so that what a file shares
is made once.
"""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from flower_split.runtime import failpoints
from tests.support.flower_home import Flower, end, make_environment, processes_of

torch.set_num_threads(1)  # the models are tiny, and sums must be repeatable
gc.disable()  # until all tests are collected: 700,000 objects, which all live to the end

PROCESSES = Path(__file__).parent / "processes"
_GIB_PER_WORKER = 3  # a worker has about 1; real runs beside it have processes of their own


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the workers of ``-n auto``: one more than cores, as memory allows, and at most eight.

    Some tests wait, for a deadline or a process; another worker has the core meanwhile.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)) + 1, int(memory / _GIB_PER_WORKER), 8))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: not item.path.is_relative_to(PROCESSES))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but never look again at what libraries and tests have made so far."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    """Every test begins and ends with all failpoints off."""
    failpoints.reset()
    yield
    failpoints.reset()


@pytest.fixture(autouse=True)
def logging_of_a_library() -> Iterator[None]:
    """A command run in a test closes the package's logger to others; the next test finds it open."""
    yield
    logger = logging.getLogger("flower_split")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message takes its origin from the running Flower task; here there is none."""
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture(scope="session")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """One isolated Flower for all tests of this session."""
    home = tmp_path_factory.mktemp("flower-home")
    try:
        yield Flower(home, make_environment(home))
    finally:
        end(processes_of(home))
