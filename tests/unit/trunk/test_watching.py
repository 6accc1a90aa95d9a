"""Who is waited for and since when, whether the compute thread answers, and what is counted."""

import logging
import threading
import time

import pytest

from flower_split.runtime.version import __version__
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.toy_trunk import ToyClient, make_engine, make_plan
from tests.unit.trunk.test_engine import batch, contribute


class SkippingClock:
    """The real clock, with seconds added."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped


@pytest.fixture
def clock() -> SkippingClock:
    return SkippingClock()


def begun(clock: SkippingClock, *slots: int) -> TrunkEngine:
    engine = make_engine(clock=clock)
    engine.begin_round(make_plan(slots, join_seconds=1e6, window_seconds=1e6))
    return engine


def waited(engine: TrunkEngine) -> dict[int, float]:
    """Whole seconds by slot, of those that are waited for."""
    slots = engine.status().slots
    return {slot.slot: round(slot.waited_seconds, -1) for slot in slots if slot.waited_seconds > 1}


def test_slot_that_has_not_joined_is_waited_for_since_the_round_began(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = begun(clock, 0, 1)
    ToyClient(engine, 0)
    clock.skipped = 40.0
    with caplog.at_level(logging.INFO, "flower_split"):
        engine.look()
        engine.look()
    assert waited(engine) == {1: 40.0}
    engine.close()  # it may be the deadline thread that looked first, and it logs afterwards
    lines = [record for record in caplog.records if "waiting for slot" in record.message]
    assert [line.message.rpartition(": ")[2] for line in lines] == ["waiting for slot 1 since 40 s"]
    assert getattr(lines[0], "slot", None) == 1


def test_slot_that_others_wait_for_in_a_window_is_told_until_it_is_there_again(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = begun(clock, 0, 1)
    fast, slow = ToyClient(engine, 0, 2), ToyClient(engine, 1, 2)
    engine.look()
    assert waited(engine) == {}  # both compute: nobody waits
    contribute(fast, 0)
    engine.look()
    clock.skipped = 40.0
    with caplog.at_level(logging.INFO, "flower_split"):
        engine.look()
        assert waited(engine) == {1: 40.0}
        clock.skipped = 50.0
        engine.look()  # not again so soon
        slow.forward(batch(1), timeout=500.0)
        slow.backward(batch(2), timeout=500.0)
        engine.look()
    assert waited(engine) == {}
    engine.close()  # it may be the deadline thread that looked first, and it logs afterwards
    ends = [record.message.rpartition(": ")[2] for record in caplog.records]
    assert [end for end in ends if "slot 1" in end] == [
        "waiting for slot 1 since 40 s",
        "slot 1 is back, after 50 s",
    ]


def test_nobody_is_waited_for_where_all_are_at_work_or_the_round_is_over(
    clock: SkippingClock,
) -> None:
    engine = begun(clock, 0, 1)
    ToyClient(engine, 0)
    ToyClient(engine, 1)
    engine.look()
    engine.abort_round("test", 1, 0, "enough")
    clock.skipped = 40.0
    engine.look()
    assert waited(engine) == {}
    assert engine.status().process.rounds_aborted == 1
    engine.close()


def test_sessions_that_open_and_close_are_logged(
    clock: SkippingClock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = begun(clock, 0)
    with caplog.at_level(logging.INFO, "flower_split"):
        client = ToyClient(engine, 0)
        contribute(client, 0)
        client.close()
    assert [record.message[-6:] for record in caplog.records if "slot 0" in record.message] == [
        "joined",
        "0 left",
    ]
    engine.close()


def test_status_counts_since_the_process_started(clock: SkippingClock) -> None:
    engine = begun(clock, 0)
    client = ToyClient(engine, 0)
    contribute(client, 0)
    engine.count_bytes(client.grant.session, 100, 30)
    engine.prepare_round("test", 1, 0, time.monotonic() + 20)
    engine.commit_round("test", 1, 0)
    engine.begin_round(make_plan((0,), server_round=2, join_seconds=1e6, window_seconds=1e6))
    clock.skipped = 60.0
    status = engine.status()
    assert (status.process.bytes_received, status.process.bytes_sent) == (100, 30)
    assert (status.process.rounds_committed, status.process.rounds_aborted) == (1, 0)
    assert status.process.compute_seconds > 0
    assert 60.0 <= status.process.uptime_seconds < 120.0
    assert status.process.package_version == __version__
    assert status.process.resident_bytes > 1 << 20
    assert not status.slots[0].joined
    engine.close()


def test_queue_seconds_grow_while_the_compute_thread_is_stuck(
    clock: SkippingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(clock=clock)
    taken, free, adapter = threading.Event(), threading.Event(), engine.compute.adapter

    def stuck() -> dict[str, object]:
        taken.set()
        assert free.wait(20)
        return dict(adapter())

    monkeypatch.setattr(engine.compute, "adapter", stuck)
    busy = threading.Thread(target=engine.adapter)
    busy.start()
    assert taken.wait(20)
    engine.look()
    clock.skipped = 200.0
    assert engine.queue_seconds >= 200.0
    free.set()
    busy.join(20)
    engine.expire()  # behind the question, on the same thread
    engine.look()
    engine.expire()
    assert engine.queue_seconds < 100.0
    engine.close()
