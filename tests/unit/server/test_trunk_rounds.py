"""The trunk's rounds: who names them, what a lost trunk costs, and what is undone."""

import pytest
from flwr.app import ArrayRecord

from flower_split.config import parse_run_config
from flower_split.errors import (
    FederationError,
    RefusalReason,
    RoundAborted,
    RoundLost,
    RunDirectoryError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, Dispatch, RoundBase, RoundPlan, RoundReport
from flower_split.server.trunk_access import TrunkAccess
from flower_split.server.trunk_rounds import CommitSink, StartingPoint, TrunkRounds
from tests.support.fakes import FakeCoordinator

REPORT = RoundReport(version=4, digest="after", slots=(), optimizer_steps=4, compute_seconds=0.0)


class Unreachable(FakeCoordinator):
    """A trunk that answers no abort for as long as ``silent`` says."""

    silent = True

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        super().abort_round(experiment, server_round, attempt, why)
        if self.silent:
            raise TrunkUnavailable("no answer")
        return 0


def make_rounds(
    coordinator: FakeCoordinator,
    start: StartingPoint = StartingPoint("exp"),  # noqa: B008 - frozen
    on_commit: CommitSink | None = None,
) -> TrunkRounds:
    config = parse_run_config({"num-server-rounds": 5, "trunk.quorum-count": 1})
    access = TrunkAccess(address="trunk.example:1")
    return TrunkRounds(coordinator, access, config, start, steps_per_round=3, on_commit=on_commit)


def test_new_attempt_names_the_next_round_and_keeps_experiment_and_base() -> None:
    coordinator = FakeCoordinator()
    rounds = make_rounds(coordinator, StartingPoint("exp", 7, RoundBase(2, "digest")))
    rounds.begin(3, {0: "a", 1: "b"})
    assert rounds.new_attempt() == 8
    rounds.begin(3, {0: "c", 1: "d"})
    named = [(plan.experiment, plan.attempt, plan.base) for plan in coordinator.plans]
    assert named == [("exp", 7, RoundBase(2, "digest")), ("exp", 8, RoundBase(2, "digest"))]
    assert coordinator.plans[0].quorum == 0.5  # one client of two


def test_buffer_names_its_dispatches_by_number() -> None:
    coordinator = FakeCoordinator()
    late, early = Dispatch(9, 0, "late"), Dispatch(4, 1, "early")
    make_rounds(coordinator).begin_buffer(1, [late, early])
    (plan,) = coordinator.plans
    assert plan.step_every is StepEvery.BUFFER
    assert plan.dispatches == (early, late)


def test_commit_moves_the_base_and_nothing_can_abort_it_afterwards() -> None:
    coordinator = FakeCoordinator(commit_error=TrunkUnavailable("gone"))
    committed: list[tuple[int, int]] = []
    start = StartingPoint("exp", 2, RoundBase(0))
    rounds = make_rounds(coordinator, start, lambda r, attempt, *_: committed.append((r, attempt)))
    rounds.begin(1, {0: "a"})
    rounds.commit(1, REPORT, ArrayRecord())  # the trunk is lost; the manifest is written
    rounds.abort("too late")
    assert committed == [(1, 2)]
    assert rounds.base == RoundBase(1, "after")
    assert "abort" not in coordinator.calls


def test_commit_point_that_fails_leaves_the_round_open_to_be_aborted() -> None:
    def full(*_: object) -> None:
        raise RunDirectoryError("no space left")

    coordinator = FakeCoordinator()
    rounds = make_rounds(coordinator, StartingPoint("exp", base=RoundBase(0)), full)
    rounds.begin(1, {0: "a"})
    with pytest.raises(RunDirectoryError):
        rounds.commit(1, REPORT, ArrayRecord())
    rounds.abort("no space left")
    rounds.abort("again")
    assert rounds.base == RoundBase(0)
    assert coordinator.calls == ["begin", "abort"]  # once is enough


def test_abort_that_the_trunk_did_not_answer_is_tried_again() -> None:
    coordinator = Unreachable()
    rounds = make_rounds(coordinator)
    rounds.abort("nothing is open")
    rounds.begin(1, {0: "a"})
    rounds.abort("first")
    coordinator.silent = False
    rounds.abort("second")
    rounds.abort("third")
    assert coordinator.whys == ["first", "second"]


@pytest.mark.parametrize(
    ("error", "arrivals", "lost"),
    [
        (TrunkUnavailable("gone"), [], True),
        (TrunkRefused(RefusalReason.WRONG_ATTEMPT, "a new process"), [], True),
        (
            TrunkRefused(RefusalReason.UNKNOWN_CONTRIBUTION, "a new process"),
            [Arrival(1, 1.0)],
            True,
        ),
        (TrunkRefused(RefusalReason.UNKNOWN_CONTRIBUTION, "a wrong client"), [], False),
        (TrunkRefused(RefusalReason.NON_FINITE, "NaN"), [], False),
        (RoundAborted("slot 1 never came"), [], False),
    ],
)
def test_prepare_is_lost_only_where_the_trunk_process_is(
    error: Exception, arrivals: list[Arrival], lost: bool
) -> None:
    coordinator = FakeCoordinator(prepare_error=error)
    rounds = make_rounds(coordinator)
    rounds.begin(2, {0: "a"})
    with pytest.raises(FederationError, match="round 2: .*Clients: all is well") as caught:
        rounds.prepare(2, arrivals, clients="all is well")
    assert isinstance(caught.value, RoundLost) == lost


def test_settle_restores_the_base_under_an_attempt_of_its_own() -> None:
    coordinator = FakeCoordinator()
    rounds = make_rounds(coordinator, StartingPoint("exp", 3, RoundBase(5, "last")))
    assert rounds.settle(5) == 1
    (plan,) = coordinator.plans
    assert (plan.attempt, plan.evaluate, plan.base) == (4, True, RoundBase(5, "last"))
    assert coordinator.calls == ["begin", "abort"]
    assert rounds.attempt == 3


def test_epoch_is_that_of_the_process_that_began_the_round() -> None:
    class Restarted(FakeCoordinator):
        def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
            super().begin_round(plan)
            return 10 + len(self.plans), 0

    rounds = make_rounds(Restarted())
    assert [rounds.begin(1, {0: "a"}), rounds.begin(1, {0: "b"})] == [11, 12]
    assert rounds.epoch == 12
