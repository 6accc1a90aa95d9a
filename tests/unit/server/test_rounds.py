"""The round loop: order of the hooks, and phases that end as soon as they cannot succeed."""

import dataclasses
import time

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from flower_split.errors import FederationError, RoundLost
from flower_split.protocol.values import TrunkStatus
from flower_split.runs.outcome import RoundOutcome
from flower_split.server import phase_watch
from flower_split.server.rounds import run_rounds
from flower_split.server.trunk_access import TrunkHealth
from tests.support.fakes import FakeCoordinator, FakeGrid, train_content
from tests.unit.server.test_trunk_strategy import (
    FEDERATION,
    NODES,
    SENT,
    arrays,
    make_config,
    make_strategy,
)


def answer(message: Message) -> RecordDict:
    if message.metadata.message_type == "evaluate":
        return RecordDict({"metrics": MetricRecord({"loss-sum": 1.0, "num-tokens": 10})})
    (received,) = message.content.array_records.values()
    return train_content(arrays(w=[float(received["w"].numpy()[0]) + 1.0]), tokens=10)


def test_run_rounds_carries_the_adapter_from_round_to_round() -> None:
    outcomes: list[RoundOutcome] = []
    coordinator = FakeCoordinator()
    grid = FakeGrid(NODES.values(), answer)
    result = run_rounds(make_strategy(coordinator), grid, SENT, on_round=outcomes.append)
    assert result["w"].numpy().tolist() == [2.0]
    assert [outcome.server_round for outcome in outcomes] == [1, 2]
    assert coordinator.calls == ["begin", "prepare", "commit", "begin", "abort"] * 2


def test_run_rounds_evaluates_every_second_round_and_the_last() -> None:
    coordinator = FakeCoordinator()
    config = dataclasses.replace(make_config(), num_server_rounds=5, evaluate_every=2)
    strategy = make_strategy(coordinator, config)
    run_rounds(strategy, FakeGrid(NODES.values(), answer), SENT, on_round=lambda _: None)
    assert [plan.server_round for plan in coordinator.plans if plan.evaluate] == [2, 4, 5]
    assert [plan.server_round for plan in coordinator.plans if not plan.evaluate] == [1, 2, 3, 4, 5]


def test_run_rounds_from_a_later_round_runs_only_the_rest() -> None:
    outcomes: list[RoundOutcome] = []
    coordinator = FakeCoordinator()
    grid = FakeGrid(NODES.values(), answer)
    run_rounds(make_strategy(coordinator), grid, SENT, start_round=2, on_round=outcomes.append)
    assert [outcome.server_round for outcome in outcomes] == [2]
    assert [plan.server_round for plan in coordinator.plans] == [2, 2]


def test_run_rounds_with_one_failure_and_one_silent_client_ends_before_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phase_watch, "_GRACE_SECONDS", 0.2)

    def mixed(message: Message) -> RecordDict | Error | None:
        partition_id = FEDERATION.partition_of(message.metadata.dst_node_id)
        return [answer(message), Error(2, "out of memory"), None, None][partition_id]

    coordinator = FakeCoordinator()
    start = time.monotonic()
    with pytest.raises(FederationError) as caught:
        run_rounds(
            make_strategy(coordinator), FakeGrid(NODES.values(), mixed), SENT, on_round=print
        )
    assert time.monotonic() - start < 10  # not round-timeout, which is half an hour
    assert "partition 1 (node 300): out of memory" in str(caught.value)
    assert "partition 2" not in str(caught.value)  # it did nothing wrong
    assert coordinator.whys[0].startswith("partition 1 (node 300): out of memory")


def test_run_rounds_with_an_aborted_trunk_ends_with_the_trunks_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phase_watch, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(phase_watch, "_STATUS_SECONDS", 0.0)
    coordinator = FakeCoordinator(
        state=TrunkStatus(epoch=1, version=0, phase="aborted", problem="slot 2 did not join")
    )
    grid = FakeGrid(NODES.values(), lambda _: None)
    with pytest.raises(FederationError, match="slot 2 did not join"):
        run_rounds(make_strategy(coordinator), grid, SENT, on_round=print)


def test_run_rounds_with_a_dead_trunk_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_watch, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(phase_watch, "_STATUS_SECONDS", 0.0)
    grid = FakeGrid(NODES.values(), lambda _: None)
    with pytest.raises(FederationError, match="trunk process ended"):
        run_rounds(
            make_strategy(FakeCoordinator()),
            grid,
            SENT,
            on_round=print,
            health=TrunkHealth(is_running=lambda: False),
        )


def test_run_rounds_after_a_lost_client_begins_the_round_again_under_a_new_attempt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = [Error(5, "node unavailable")]

    def once(message: Message) -> RecordDict | Error | None:
        return lost.pop() if lost else answer(message)

    coordinator = FakeCoordinator()
    grid = FakeGrid(NODES.values(), once)
    result = run_rounds(make_strategy(coordinator), grid, SENT, on_round=lambda outcome: None)
    assert result["w"].numpy().tolist() == [2.0]  # as if nothing had been lost
    assert [call for call in coordinator.calls if call != "abort"][:3] == [
        "begin",
        "begin",
        "prepare",
    ]
    assert [(plan.server_round, plan.attempt) for plan in coordinator.plans[:2]] == [(1, 0), (1, 1)]
    assert "begins again (attempt 1)" in caplog.text


def test_run_rounds_gives_up_after_the_retries() -> None:
    grid = FakeGrid(NODES.values(), lambda _: Error(5, "node unavailable"))
    coordinator = FakeCoordinator()
    with pytest.raises(RoundLost, match="node unavailable"):
        run_rounds(make_strategy(coordinator), grid, SENT, on_round=print)
    assert len(coordinator.plans) == 1 + make_config().round_retries


def test_run_rounds_logs_where_the_trunk_stands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(phase_watch, "_STATUS_SECONDS", 0.0)
    state = TrunkStatus(
        epoch=1, version=5, phase="open", window=2, num_tokens=900.0, bytes_received=4_000_000
    )
    config = dataclasses.replace(make_config(), num_server_rounds=1)
    strategy = make_strategy(FakeCoordinator(state=state), config)
    with caplog.at_level("INFO", logger="flower_split"):
        run_rounds(strategy, FakeGrid(NODES.values(), answer), SENT, on_round=lambda outcome: None)
    assert "round 1/1 step 2/3" in caplog.text
    assert "4.0 MB" in caplog.text
