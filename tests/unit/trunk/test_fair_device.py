"""Turns on one device: whose calls have computed least goes next, and one computes at a time."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flower_split.config import OptimizerConfig
from flower_split.errors import TrunkUnavailable
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.fair_device import DeviceShare, FairDevice
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.engine_rig import ManualClock
from tests.support.toy_trunk import HIDDEN, ToyClient, ToyTrunk, make_plan


class Line:
    """Shares that always have a next turn to wait for, on a clock that their turns move."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.device = FairDevice(self.clock)
        self.served: list[str] = []
        self._left = 0
        self._lock = threading.Lock()

    def run(self, **turns: tuple[float, int]) -> list[str]:
        """Let each share take so many turns of so many seconds; return who was served, in order."""
        self._left = len(turns)
        with ThreadPoolExecutor(len(turns)) as pool:
            with self.device.share().turn():  # all of them wait before the first begins
                futures = []
                for name, (seconds, count) in turns.items():
                    futures.append(pool.submit(self._take, name, seconds, count))
                    self._until(len(futures))
            for future in futures:
                future.result(20)
        return self.served

    def _take(self, name: str, seconds: float, count: int) -> None:
        share = self.device.share()
        for _ in range(count):
            share.expect()
        for turn in range(count):
            with share.turn():
                self._until(self._left - 1)  # so that the order is not that of threads
                self.served.append(name)
                self.clock.now += seconds
                self._left -= turn == count - 1

    def _until(self, waiting: int) -> None:
        deadline = time.monotonic() + 20
        while self.device.num_waiting != waiting:
            assert time.monotonic() < deadline, "a share does not come back for its next turn"
            time.sleep(0)  # gives the processor to its thread


def test_heavy_calls_and_light_calls_get_the_same_seconds() -> None:
    served = Line().run(heavy=(10.0, 4), light=(1.0, 40))
    # heavy first, for it came first; then light until it has had as much.
    assert "".join(name[0] for name in served) == 4 * ("h" + 10 * "l")


def test_who_came_first_goes_first_where_all_have_computed_as_much() -> None:
    assert Line().run(a=(1.0, 3), b=(1.0, 3), c=(1.0, 3)) == 3 * ["a", "b", "c"]


def test_who_comes_back_does_not_catch_up_what_it_did_not_use() -> None:
    line = Line()
    line.run(early=(100.0, 9))
    line.served.clear()
    # A latecomer with nothing used goes on beside the other, not before it for 900 seconds.
    assert line.run(old=(1.0, 3), new=(1.0, 3)) == ["old", "new", "old", "new", "old", "new"]


def test_device_is_free_again_after_a_turn_that_failed_and_while_one_is_aside() -> None:
    device = FairDevice()
    one, other = device.share(), device.share()
    with pytest.raises(ValueError), one.turn():
        raise ValueError
    with one.turn(), one.aside(), other.turn():
        pass
    assert device.num_waiting == 0


def outputs(engine: TrunkEngine, experiment: str, barrier: threading.Barrier) -> list[Tensor]:
    """What twenty forwards of an engine whose trunk has dropout give."""
    engine.begin_round(make_plan((0,), experiment=experiment, steps_per_round=20))
    client = ToyClient(engine, 0, 20)
    barrier.wait(20)
    hidden = torch.ones(64, 64, HIDDEN)
    found = [
        client.forward(hidden, micro_batch=index, digest=bytes([index]), last=False).tensor
        for index in range(20)
    ]
    engine.close()
    return found


def dropping(device: FairDevice | None) -> TrunkEngine:
    share = None if device is None else device.share()
    compute = TrunkCompute(ToyTrunk(0.5), OptimizerConfig(name="sgd"), seed=0, share=share)
    return TrunkEngine(
        compute, mode="joint", hidden_size=HIDDEN, fingerprint={"model": "toy"},
        activation_bytes=1 << 30,
    )  # fmt: skip


def test_dropout_of_engines_at_once_is_that_of_each_alone() -> None:
    """Torch's random state is one for the process; without turns this fails in most runs."""
    names = ["a", "b", "c", "d"]
    alone = [outputs(dropping(None), name, threading.Barrier(1)) for name in names]
    device, barrier = FairDevice(), threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda name: outputs(dropping(device), name, barrier), names))
    for expected, found in zip(alone, at_once, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def waiting(device: FairDevice, number: int) -> None:
    """Return when so many wait for a turn."""
    deadline = time.monotonic() + 20
    while device.num_waiting != number:
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0)


def test_long_wait_is_logged_with_whom_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    device = FairDevice(first_line=0.01)
    one, other = device.share(), device.share()
    one.name, other.name = "first", "second"

    def turn() -> None:
        with other.turn():
            pass

    with ThreadPoolExecutor(1) as pool:
        with one.turn():
            future = pool.submit(turn)
            deadline = time.monotonic() + 20
            while len(caplog.records) < 3:
                assert time.monotonic() < deadline, "the log does not say that somebody waits"
                time.sleep(0.001)
        future.result(20)  # it has its turn after all
    assert caplog.messages[0].startswith(
        "experiment second has waited for 0.01 s for its turn on the trunk's device: experiment first "
        "has computed for "
    )
    assert "waited for 0.02 s" in caplog.messages[1] and "waited for 0.04 s" in caplog.messages[2]


def test_wait_with_a_deadline_ends_and_says_whom_it_waited_for() -> None:
    device = FairDevice()
    one, other = device.share(), device.share()
    one.name, other.name = "first", "second"
    with one.turn():
        with pytest.raises(TrunkUnavailable, match="experiment second .* experiment first has"):
            with other.turn(0.01):
                pass
        assert device.num_waiting == 0
    with other.turn(0.01):  # nobody has it now
        pass


def test_closed_share_begins_no_turn_and_leaves_the_others_theirs() -> None:
    device = FairDevice()
    one, closed, other = device.share(), device.share(), device.share()

    def turn(share: DeviceShare) -> str:
        with share.turn():
            return "computed"

    with ThreadPoolExecutor(2) as pool:
        with one.turn():
            ended = pool.submit(turn, closed)
            waiting(device, 1)
            goes_on = pool.submit(turn, other)
            waiting(device, 2)
            closed.close()
            with pytest.raises(TrunkUnavailable, match="has ended before its turn"):
                ended.result(20)
            assert not goes_on.done()
        assert goes_on.result(20) == "computed"
    with pytest.raises(TrunkUnavailable), closed.turn():
        pass


def test_share_that_is_closed_aside_goes_on_with_its_turn() -> None:
    device = FairDevice()
    one, other = device.share(), device.share()
    order: list[str] = []

    def compute() -> None:
        with one.turn():
            with one.aside():
                aside.set()
                taken.wait(20)
            order.append("one")

    aside, taken = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(compute)
        aside.wait(20)
        with other.turn():
            taken.set()
            waiting(device, 1)
            one.close()
            order.append("other")
        future.result(20)
    assert order == ["other", "one"]


def test_engine_closes_while_another_one_holds_the_device() -> None:
    device = FairDevice()
    engine, held = dropping(device), device.share()
    engine.begin_round(make_plan((0,), experiment="a", steps_per_round=20))
    with held.turn(), ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine.adapter)
        waiting(device, 1)
        engine.close()
        with pytest.raises(
            (TrunkUnavailable, CancelledError)
        ):  # before its turn, or before its run
            call.result(20)
