"""For all tests: one CPU thread, no failpoint left on, an origin for Flower's messages.

With ``-n auto`` the tests of a file run in one process, so that what a file shares is made once; the
files that run real Flower are one group, so that there is one SuperLink and one run at a time.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from flower_split.runtime import failpoints
from tests.support.flower_home import Flower, end, make_environment, processes_of

torch.set_num_threads(1)  # the models are tiny, and sums must be repeatable

PROCESSES = Path(__file__).parent / "processes"
_GIB_PER_WORKER = 3  # a worker has about 1; real runs beside it have processes of their own


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the workers of ``-n auto``: one per core, as memory allows, and at most eight."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / _GIB_PER_WORKER), 8))


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the tests' names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for workers; the longest group goes first, so that none is left with it."""
    groups = {path: _group(path) for path in {item.path for item in items}}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item.path]))
    items.sort(key=lambda item: groups[item.path] != "processes")


def _group(path: Path) -> str:
    if path.is_relative_to(PROCESSES):
        return "processes"
    return str(path.relative_to(PROCESSES.parent))


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    """Every test begins and ends with all failpoints off."""
    failpoints.reset()
    yield
    failpoints.reset()


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
