"""Around the commit point: before it everything is undone, after it nothing is."""

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from flower_split.config import parse_run_config
from flower_split.errors import RoundAborted, RoundLost, RunDirectoryError, TrunkUnavailable
from flower_split.protocol.values import ActivationReport, RoundBase, RoundReport, SlotReport
from flower_split.runs.directory import RunDirectory
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from tests.support.fakes import FakeCoordinator, FakeGrid
from tests.unit.server.test_trunk_strategy import NODES, good_answer, make_strategy, train


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's own processes set before they make a message."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Counting(FedAvg):
    """FedAvg with a state that every aggregation changes."""

    def __init__(self) -> None:
        super().__init__(min_train_nodes=1, min_available_nodes=1, weighted_by_key="num-tokens")
        self.count = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["count"])

    def aggregate_train(self, server_round, replies):
        self.count += 1
        return super().aggregate_train(server_round, replies)


def grid() -> FakeGrid:
    return FakeGrid(NODES.values(), good_answer)


def test_commit_writes_the_manifest_before_the_trunk_commits():
    coordinator = FakeCoordinator()

    def sink(server_round: int, attempt: int, report: RoundReport, arrays: ArrayRecord) -> None:
        coordinator.calls.append(f"manifest {server_round}")

    strategy = make_strategy(coordinator, base=RoundBase(0), on_commit=sink)
    train(strategy, grid())
    assert coordinator.calls == ["begin", "prepare", "manifest 1", "commit"]
    assert coordinator.plans[0].base == RoundBase(0)
    assert strategy.trunk_rounds.base == RoundBase(1, "")


def test_commit_point_that_fails_undoes_the_strategy_and_the_trunk():
    coordinator = FakeCoordinator()

    def full(server_round: int, attempt: int, report: RoundReport, arrays: ArrayRecord) -> None:
        raise RunDirectoryError("no space left")

    inner = Counting()
    strategy = make_strategy(coordinator, base=RoundBase(0), on_commit=full, inner=inner)
    with pytest.raises(RunDirectoryError):
        train(strategy, grid())
    assert inner.count == 0
    assert coordinator.calls == ["begin", "prepare", "abort"]
    assert strategy.trunk_rounds.base == RoundBase(0)


@pytest.mark.parametrize("error", [TrunkUnavailable("gone"), RoundAborted("restarted")])
def test_trunk_that_is_lost_after_the_commit_point_does_not_undo_the_round(error):
    coordinator = FakeCoordinator(commit_error=error)
    inner = Counting()
    strategy = make_strategy(coordinator, base=RoundBase(0), on_commit=lambda *_: None, inner=inner)
    arrays, _ = train(strategy, grid())
    assert arrays is not None
    assert inner.count == 1
    assert strategy.trunk_rounds.base == RoundBase(
        1, ""
    )  # the next round names it, and the trunk follows
    assert "abort" not in coordinator.calls


@pytest.mark.parametrize(
    ("codes", "lost"),
    [
        ({300: 5}, True),  # Flower's NODE_UNAVAILABLE
        ({300: 70, 900: 0}, True),  # lost the trunk; a simulation's actor died
        ({300: 2}, False),  # the client's own error
        ({300: 5, 900: 2}, False),
    ],
)
def test_round_is_lost_only_where_nobody_failed_by_itself(codes, lost):
    def answer(message: Message):
        code = codes.get(message.metadata.dst_node_id)
        return good_answer(message) if code is None else Error(code, "why")

    with pytest.raises(Exception, match="why") as info:
        train(make_strategy(FakeCoordinator()), FakeGrid(NODES.values(), answer))
    assert isinstance(info.value, RoundLost) == lost


def test_recorder_of_a_resumed_run_drops_what_was_not_committed(tmp_path):
    config = parse_run_config({"run-dir": str(tmp_path / "run"), "num-server-rounds": 3})
    recorder = Recorder(RunDirectory.create(config), config)
    result = {"loss-sum": 8.0, "num-tokens": 4}
    report = RoundReport(
        version=2,
        digest="d",
        slots=(SlotReport(slot=0, completed=True), SlotReport(slot=1, problem="silent")),
        optimizer_steps=2,
        compute_seconds=0.5,
        activations=ActivationReport(peak_bytes=7, budget_bytes=9, recomputes=1, refusals=2),
    )
    for server_round in (0, 1, 2):
        if server_round:
            metrics = {"num-tokens": 10, "train_loss": 1.0, "bytes-sent": 5, "bytes-received": 6}
            recorder.steps(server_round, 0, {"loss": [2.0, 1.0]}, metrics)
            recorder.trunk_round(server_round, 0, report)
        recorder.evaluation(server_round, 0, result)
        if server_round < 2:  # round 2 was lost before it was done
            recorder.round_done(RoundOutcome(server_round, 1.0))

    again = Recorder(RunDirectory.open(tmp_path / "run"), config)
    again.forget_after(1)
    assert (again.has_round(1), again.has_round(2)) == (True, False)
    assert {record.get("server_round") for record in again.run.metrics()} == {0, 1}
    (trunk,) = again.run.metrics("trunk")
    assert (trunk["activation_peak_bytes"], trunk["left_out"]) == (7, {"1": "silent"})
    assert again.eval_loss(1) == 2.0
