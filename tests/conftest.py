"""For all tests: one CPU thread, no failpoint left on, an origin for Flower's messages."""

from collections.abc import Iterator

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from flower_split.runtime import failpoints
from tests.support.flower_home import Flower, end, make_environment, processes_of

torch.set_num_threads(1)  # the models are tiny, and sums must be repeatable


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
