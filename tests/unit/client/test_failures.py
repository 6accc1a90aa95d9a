"""Nothing hangs and nothing counts twice: absent, slow, restarted and killed trunks."""

import random
import socket
import threading
import time
from multiprocessing.connection import Connection

import pytest
import torch

from flower_split.errors import RoundAborted, TrunkError, TrunkUnavailable
from flower_split.protocol.values import BackwardCall, CallResult, ForwardCall
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.grpc_status import TrunkBusy
from tests.support.loopback import (
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)
from tests.support.ready_processes import READY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_absent_trunk_is_unavailable_within_the_timeout_with_address_and_remedy() -> None:
    port = free_port()
    with remote(port, call_timeout=1.0) as trunk:
        began = time.monotonic()
        with pytest.raises(TrunkUnavailable, match=f"127.0.0.1:{port}.*trunk.address"):
            trunk.open(1)
        assert time.monotonic() - began < 2.0


def test_coordinator_of_an_absent_trunk_is_told_within_the_timeout() -> None:
    with coordinator(free_port(), timeout=0.5) as control:
        began = time.monotonic()
        with pytest.raises(TrunkUnavailable, match="Status at the trunk"):
            control.status()
        assert time.monotonic() - began < 1.5


def test_silent_listener_is_unavailable_within_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with remote(silent.getsockname()[1], call_timeout=1.0) as trunk:
            began = time.monotonic()
            with pytest.raises(TrunkUnavailable):
                trunk.open(1)
            assert time.monotonic() - began < 2.0


def test_slow_engine_ends_in_a_deadline_error_on_both_sides() -> None:
    deadlines: list[float] = []

    class Slow(FakeEngine):
        def forward(self, call: ForwardCall) -> CallResult:
            self._note("forward", call)
            deadlines.append(call.deadline - time.monotonic())
            self.wait(call.deadline)
            raise TrunkUnavailable("waiting for version 11 of the weights")

    engine = Slow()
    with served(engine) as port, remote(port, call_timeout=1.5) as trunk, torch.no_grad():
        trunk.open(1)
        began = time.monotonic()
        with pytest.raises(TrunkUnavailable, match="waiting for version 11") as caught:
            trunk(torch.ones(1, 1, HIDDEN))
        assert 1.0 < time.monotonic() - began < 2.5
        assert "trunk.call-timeout" in str(caught.value)
    assert deadlines and all(0 < left < 1.5 for left in deadlines)


@pytest.mark.parametrize("error", [TrunkBusy("full"), TrunkUnavailable("late")])
def test_retry_repeats_the_same_key_and_digest(error: TrunkError) -> None:
    fired: list[str] = []

    def on_call(method: str, number: int) -> None:
        if method in ("forward", "backward") and number <= 2:
            fired.append(method)
            raise error

    engine = FakeEngine(on_call)
    state = random.getstate(), torch.get_rng_state()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        hidden = torch.ones(1, 2, HIDDEN, requires_grad=True)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        output.sum().backward()
        assert trunk.stats.calls == 2
    assert fired == ["forward"] * 2 + ["backward"] * 2
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
    for method in ("forward", "backward"):
        attempts = [call for name, (call, *_) in engine.calls if name == method]
        assert len(attempts) == 3
        assert len({call.key for call in attempts}) == 1
        assert len({call.digest for call in attempts}) == 1


def test_refusals_and_aborts_are_not_retried() -> None:
    def on_call(method: str, number: int) -> None:
        if method == "forward":
            raise RoundAborted("no quorum")

    engine = FakeEngine(on_call)
    with served(engine) as port, remote(port) as trunk, torch.no_grad():
        trunk.open(1)
        with pytest.raises(RoundAborted):
            trunk(torch.ones(1, 1, HIDDEN))
    assert engine.count("forward") == 1


def test_retried_backward_of_the_real_engine_counts_once() -> None:
    """The reply is lost after the engine has accumulated; the retry gets the same reply."""
    lost: list[str] = []

    class Losing:
        """The engine, whose first backward's reply does not reach the client."""

        def __init__(self) -> None:
            self.inner = make_engine(TinyTrunk())

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def backward(self, call: BackwardCall) -> CallResult:
            result = self.inner.backward(call)
            if not lost:
                lost.append("backward")
                raise TrunkBusy("the reply is lost")
            return result

    engine = Losing()
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        with remote(port) as trunk:
            trunk.open(1)
            with trunk.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                output = trunk(torch.ones(1, 2, HIDDEN, requires_grad=True))
            output.sum().backward()
            report = control.prepare_round("e", 1, 0)
    assert lost == ["backward"]
    assert report.slots[0].contributions == 1 and report.slots[0].num_tokens == 2.0
    assert report.optimizer_steps == 1


def serve_and_hang(pipe: Connection) -> None:
    """A trunk whose forwards say that they have come, and never end."""

    def on_call(method: str, number: int) -> None:
        if method == "forward":
            pipe.send("forward")
            time.sleep(60)

    server = TrunkServer(FakeEngine(on_call), coordinator_token="t")
    pipe.send(server.start())
    pipe.poll(None)


def test_killed_trunk_mid_call_is_unavailable_and_never_hangs() -> None:
    ours, theirs = READY.Pipe()
    process = READY.Process(target=serve_and_hang, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(240)
        port = ours.recv()
        with remote(port, call_timeout=4.0) as trunk:
            trunk.open(1)
            errors: list[BaseException] = []

            def forward() -> None:
                try:
                    with torch.no_grad():
                        trunk(torch.ones(1, 1, HIDDEN))
                except TrunkError as error:
                    errors.append(error)

            call = threading.Thread(target=forward)
            call.start()
            assert ours.poll(60) and ours.recv() == "forward", errors
            process.kill()
            began = time.monotonic()
            call.join(10)
            assert not call.is_alive() and time.monotonic() - began < 5
            (error,) = errors
            assert isinstance(error, TrunkUnavailable)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def test_trunk_that_comes_up_late_is_found_by_the_retries() -> None:
    port = free_port()
    engine = FakeEngine()
    opened: list[str] = []
    with remote(port) as trunk:

        def join() -> None:
            opened.append(trunk.open(1).session)

        joining = threading.Thread(target=join)
        joining.start()
        joining.join(0.5)
        assert joining.is_alive()
        with served(engine, listen=f"127.0.0.1:{port}"):
            joining.join(10)
            assert opened == ["session-of-token-0"]
            trunk.close()


def test_connection_closed_under_a_call_ends_it_as_unavailable() -> None:
    started, go = threading.Event(), threading.Event()

    def on_call(method: str, number: int) -> None:
        if method == "forward":
            started.set()
            go.wait(10)

    errors: list[TrunkError] = []
    with served(FakeEngine(on_call)) as port, remote(port) as trunk:
        trunk.open(1)

        def forward() -> None:
            try:
                with torch.no_grad():
                    trunk(torch.ones(1, 1, HIDDEN))
            except TrunkError as error:
                errors.append(error)

        call = threading.Thread(target=forward)
        call.start()
        assert started.wait(10)
        trunk._calls.channel.close()
        call.join(10)
        go.set()
    (error,) = errors
    assert isinstance(error, TrunkUnavailable) and "cut off" in str(error)


def test_closed_remote_trunk_raises_instead_of_calling() -> None:
    with served(FakeEngine()) as port:
        trunk = remote(port)
        trunk.open(1)
        trunk.close()
        trunk.close()
        with pytest.raises(TrunkError, match="open"), torch.no_grad():
            trunk(torch.ones(1, 1, HIDDEN))
        with pytest.raises(TrunkError, match="closed"):
            trunk.open(1)


def test_close_while_the_trunk_is_gone_does_not_raise_or_wait_long() -> None:
    with served(FakeEngine()) as port:
        trunk = remote(port, call_timeout=1.0)
        trunk.open(1)
    began = time.monotonic()
    trunk.close()
    assert time.monotonic() - began < 2.0
