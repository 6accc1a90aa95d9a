"""The coordinator's calls reach the real engine and come back as the values they are."""

import pytest
import torch

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.convert import (
    plan_from_proto,
    plan_to_proto,
)
from flower_split.protocol.reports import (
    report_from_proto,
    report_to_proto,
    status_from_proto,
    status_to_proto,
)
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    ProcessReport,
    RoundPlan,
    RoundReport,
    SlotReport,
    TrunkStatus,
)
from tests.support.loopback import (
    FINGERPRINT,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)

SLOT = SlotReport(
    slot=3,
    completed=True,
    problem="p",
    contributions=4,
    num_tokens=5.5,
    bytes_received=6,
    bytes_sent=7,
    joined=True,
    waited_seconds=8.5,
    silent_seconds=9.5,
)
PROCESS = ProcessReport(
    package_version="10",
    uptime_seconds=11.5,
    round_seconds=12.5,
    queue_seconds=13.5,
    resident_bytes=14,
    accelerator_bytes=15,
    accelerator_peak_bytes=16,
    bytes_received=16,
    bytes_sent=17,
    rounds_committed=18,
    rounds_aborted=19,
    checkpoint_seconds=20.5,
    compute_seconds=21.5,
)


def test_plan_report_and_status_survive_the_protocol() -> None:
    """Every field has a value of its own, so that none can stand in for another."""
    plan_ = RoundPlan(
        experiment="e",
        server_round=2,
        attempt=3,
        participants={4: "a", 9: "b"},
        step_every=StepEvery.SERVER_ROUND,
        steps_per_round=5,
        num_server_rounds=6,
        quorum=0.75,
        join_seconds=7.5,
        window_seconds=8.5,
        coordinator_seconds=9.5,
        evaluate=True,
    )
    assert plan_from_proto(plan_to_proto(plan_)) == plan_
    report = RoundReport(
        version=1, digest="d", slots=(SLOT,), optimizer_steps=2, compute_seconds=3.5
    )
    assert report_from_proto(report_to_proto(report)) == report
    status = TrunkStatus(
        epoch=(1 << 63) - 1,
        version=2,
        experiment="e",
        server_round=3,
        attempt=4,
        phase="open",
        window=5,
        num_tokens=6.5,
        bytes_received=7,
        bytes_sent=8,
        slots=(SLOT,),
        problem="p",
        fingerprint={"a": "b"},
        process=PROCESS,
    )
    assert status_from_proto(status_to_proto(status)) == status


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"participants": {0: "same", 1: "same"}}, "token of its own"),
        ({"participants": {0: ""}}, "token of its own"),
        ({"quorum": 0.0}, "quorum"),
        ({"quorum": float("nan")}, "quorum"),
        ({"join_seconds": 0.0}, "join_seconds"),
    ],
)
def test_begin_round_with_a_wrong_plan_is_refused(changes: dict[str, object], match: str) -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as control:
        with pytest.raises(TrunkRefused, match=match) as caught:
            control.begin_round(plan(**changes))
    assert caught.value.reason is RefusalReason.INVALID_REQUEST


def test_round_begins_reports_commits_and_gives_its_weights() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as control:
        assert control.begin_round(plan()) == (engine.epoch, 0)
        with remote(port) as trunk:
            trunk.open(1)
            with trunk.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                output = trunk(torch.ones(1, 2, HIDDEN))
            output.sum().backward()
            sent = trunk.stats.bytes_sent
        report = control.prepare_round("e", 1, 0)
        assert control.commit_round("e", 1, 0) == 1
        assert control.commit_round("e", 1, 0) == 1
        status, adapter = control.status(), control.get_adapter()
    assert (report.version, report.optimizer_steps) == (1, 1)
    (slot,) = report.slots
    assert (slot.slot, slot.completed, slot.contributions) == (0, True, 1)
    assert (slot.num_tokens, slot.bytes_received) == (2.0, sent)
    assert (status.epoch, status.version, status.phase) == (engine.epoch, 1, "idle")
    assert status.fingerprint == FINGERPRINT
    expected = engine.compute.adapter()
    assert list(adapter) == sorted(expected)
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)


def test_aborted_round_rolls_back_and_says_why() -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as control:
        control.begin_round(plan())
        assert control.abort_round("e", 1, 0, "a client failed") == 0
        assert control.status().problem == "a client failed"
        with pytest.raises(TrunkRefused) as caught:
            control.commit_round("e", 9, 0)
        assert caught.value.reason is RefusalReason.WRONG_ATTEMPT
