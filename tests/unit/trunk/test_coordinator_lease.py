"""A round whose coordinator has gone is given up, so that its clients stop; a prepared one waits."""

import threading
import time

import pytest

from flower_split.config import parse_run_config
from flower_split.errors import RoundAborted, TrunkUnavailable
from flower_split.server.heartbeat import LEASE_SECONDS, Heartbeat
from flower_split.server.trunk_access import TrunkAccess
from flower_split.server.trunk_rounds import StartingPoint, TrunkRounds
from tests.support.fakes import FakeCoordinator
from tests.support.loopback import TinyTrunk, coordinator, make_engine, plan, served
from tests.support.toy_trunk import ToyClient, make_plan
from tests.support.toy_trunk import make_engine as make_toy_engine
from tests.unit.trunk.test_engine import batch, contribute
from tests.unit.trunk.test_watching import SkippingClock


def test_clients_of_a_round_without_its_coordinator_are_told_that_it_is_over() -> None:
    clock = SkippingClock()
    engine = make_toy_engine(clock=clock)
    engine.begin_round(make_plan((0,), coordinator_seconds=45.0, window_seconds=1e6))
    client = ToyClient(engine, 0, 3)
    clock.skipped = 40.0
    engine.keep_alive()
    clock.skipped = 80.0  # 40 s after the latest word
    engine.expire()
    assert engine.status().phase == "open"
    clock.skipped = 90.0
    engine.expire()
    status = engine.status()
    assert status.phase == "aborted" and "said nothing for 45 s" in status.problem
    with pytest.raises(RoundAborted, match="coordinator"):
        client.forward(batch(1), timeout=500.0)
    engine.close()


def test_prepared_round_waits_for_its_commit_and_a_plan_without_lease_for_anybody() -> None:
    clock = SkippingClock()
    engine = make_toy_engine(clock=clock)
    engine.begin_round(make_plan((0,), coordinator_seconds=45.0, window_seconds=1e6))
    contribute(ToyClient(engine, 0), 0)
    engine.prepare_round("test", 1, 0, time.monotonic() + 20)
    clock.skipped = 1000.0
    engine.expire()
    assert engine.status().phase == "prepared"
    engine.commit_round("test", 1, 0)
    engine.begin_round(make_plan((0,), server_round=2, window_seconds=1e6, join_seconds=1e6))
    clock.skipped = 9000.0
    engine.expire()
    assert engine.status().phase == "joining"
    engine.close()


def test_status_of_an_operator_keeps_no_round_alive_and_the_coordinators_word_does() -> None:
    with served(make_engine(TinyTrunk())) as port, coordinator(port) as link:
        link.begin_round(plan(1, coordinator_seconds=0.2, join_seconds=60.0))
        deadline = time.monotonic() + 20
        while link.status().phase != "aborted":
            assert time.monotonic() < deadline
        assert "said nothing" in link.status().problem
        link.begin_round(plan(1, attempt=1, coordinator_seconds=30.0, join_seconds=60.0))
        link.keep_alive()
        assert link.status().phase == "joining"


def test_heartbeat_goes_on_where_the_trunk_does_not_answer_and_ends_when_it_is_closed() -> None:
    said, thrice = [], threading.Event()

    class Trunk:
        def keep_alive(self) -> None:
            said.append(1)
            if len(said) == 3:
                thrice.set()
            raise TrunkUnavailable("nobody is there")

    with Heartbeat(Trunk(), seconds=0.01):
        assert thrice.wait(20)
    count = len(said)
    assert threading.active_count() and all(t.name != "heartbeat" for t in threading.enumerate())
    assert len(said) == count


@pytest.mark.parametrize(("address", "lease"), [("", 0.0), ("trunk.example:9500", LEASE_SECONDS)])
def test_only_a_trunk_that_runs_elsewhere_is_given_a_lease(address: str, lease: float) -> None:
    link = FakeCoordinator()
    rounds = TrunkRounds(
        link,
        TrunkAccess(address="127.0.0.1:1"),
        parse_run_config({"trunk.address": address}),
        StartingPoint("e"),
        steps_per_round=1,
    )
    rounds.begin(1, {0: "t"})
    assert link.plans[0].coordinator_seconds == lease
