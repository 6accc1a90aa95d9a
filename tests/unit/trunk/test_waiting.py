"""What a call reports of its wait for the other clients."""

import threading
import time

import pytest
import torch

from flower_split.errors import TrunkUnavailable
from tests.support.toy_trunk import ToyClient, make_engine, make_plan
from tests.unit.trunk.test_engine import batch, contribute


def test_wait_for_the_other_clients_is_reported_as_queue_seconds():
    skipped, entered, results = [0.0], threading.Event(), []

    def clock() -> float:
        now = time.monotonic() + skipped[0]
        if threading.current_thread() is ahead:
            entered.set()
        return now

    def go_on() -> None:
        results.append(fast.forward(batch(5), 1, timeout=60.0))

    ahead = threading.Thread(target=go_on)
    engine = make_engine(clock=clock)
    engine.begin_round(make_plan())
    fast, slow = (ToyClient(engine, slot, 2) for slot in (0, 1))
    contribute(fast, 0)
    ahead.start()
    assert entered.wait(20)
    skipped[0] = 10.0  # the slow client takes so long
    contribute(slow, 1)
    ahead.join(timeout=20)
    assert 10.0 <= results[0].queue_seconds < 40.0
    assert results[0].compute_seconds < 5.0
    engine.close()


def test_prepare_past_its_deadline_says_so_and_its_retry_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    engine.begin_round(make_plan((0,)))
    contribute(ToyClient(engine, 0), 0)
    taken, free, adapter = threading.Event(), threading.Event(), engine.compute.adapter

    def slow() -> dict[str, torch.Tensor]:
        taken.set()
        assert free.wait(20)
        return adapter()

    monkeypatch.setattr(engine.compute, "adapter", slow)
    busy = threading.Thread(target=engine.adapter)  # keeps the compute thread
    busy.start()
    assert taken.wait(20)
    with pytest.raises(TrunkUnavailable, match="waiting for the trunk's compute thread"):
        engine.prepare_round("test", 1, 0, time.monotonic() + 0.05)
    free.set()
    busy.join(timeout=20)
    assert engine.prepare_round("test", 1, 0, time.monotonic() + 20).optimizer_steps == 1
    engine.close()


def test_contribution_that_ends_no_window_wakes_nobody_and_the_step_wakes_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many clients all wait for the step: each would look, and wait again, at every backward."""
    engine = make_engine()
    engine.begin_round(make_plan((0, 1, 2)))
    clients = [ToyClient(engine, slot, 2) for slot in (0, 1, 2)]
    changed, told = engine._index.changed, []
    wake = changed.notify_all
    monkeypatch.setattr(changed, "notify_all", lambda: (told.append(1), wake()))
    contribute(clients[0], 0)
    contribute(clients[1], 1)
    engine._thread.do(lambda: None)  # a reply comes before the window is looked at
    assert told == []
    contribute(clients[2], 2)
    engine._thread.do(lambda: None)
    assert told and engine.status().version == 1
    engine.close()
