"""A participant that wants more than its share is refused by the key, and costs the others nothing."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import grpc
import pytest
import torch

from flower_split.errors import RoundAborted, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.limits import Limits
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from flower_split.wire.sending import Outgoing
from tests.hostile.test_strangers import Silence
from tests.support.loopback import HIDDEN, TinyTrunk, coordinator, make_engine, plan, remote, served
from tests.support.toy_trunk import ToyClient, make_plan
from tests.support.toy_trunk import make_engine as make_toy_engine

ATTACKER, HONEST = 1, 0


class Stalled(Silence):
    """A stream that sends a header which announces tensors, and then nothing."""

    def __init__(self, session: str, epoch: int, hidden: torch.Tensor) -> None:
        super().__init__()
        header = pb.ForwardHeader(session=session, trunk_epoch=epoch, mode=3)
        self._first = list(Outgoing(pb.Header(forward=header), {"hidden_states": hidden}).frames())[
            :1
        ]

    def __next__(self) -> bytes:
        return self._first.pop() if self._first else super().__next__()


@contextmanager
def evaluation(
    limits: Limits, **options: object
) -> Iterator[tuple[grpc.Channel, pb.OpenSessionReply, object]]:
    """A round of two, the attacker's own channel and grant, and the honest client."""
    with (
        served(make_engine(TinyTrunk()), limits=limits, **options) as port,
        coordinator(port) as control,
        remote(port, slot=HONEST) as honest,
        remote(port, slot=ATTACKER) as attacker,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        control.begin_round(plan(2, evaluate=True))
        honest.open(0, evaluate=True)
        yield channel, attacker.open(0, evaluate=True), honest


def start(channel: grpc.Channel, requests: Iterator[bytes]) -> grpc.Call:
    call = channel.stream_stream(f"/{SERVICE}/Forward")
    return call(requests, timeout=60, metadata=bearer(f"token-{ATTACKER}"))


def refusal_of(call: grpc.Call) -> str:
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return call.details()


def assert_unharmed(honest: object) -> None:
    with torch.no_grad():
        assert torch.isfinite(honest(torch.ones(1, 2, HIDDEN))).all()


def test_silent_streams_of_a_participant_hold_its_own_share_of_workers() -> None:
    with evaluation(Limits(calls=3)) as (channel, _, honest):
        silences = [Silence() for _ in range(12)]
        calls = [start(channel, silence) for silence in silences]
        ended = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: ended.release())
        try:
            assert all(ended.acquire(timeout=20) for _ in range(9))
            refused = [call for call in calls if call.done()]
            assert len(refused) == 9  # the three others hold a worker each: the attack happened
            assert all("trunk.max-calls-in-flight" in refusal_of(call) for call in refused)
            assert_unharmed(honest)
        finally:
            for silence in silences:
                silence.end()


def test_announced_bytes_of_a_participant_are_bounded_before_they_are_allocated() -> None:
    hidden = torch.ones(1, 40_000, HIDDEN)  # 0.96 MB of the 1.5 MB
    with evaluation(Limits(call_bytes=1_500_000)) as (channel, grant, honest):
        stalled = [Stalled(grant.session, grant.epoch, hidden) for _ in range(8)]
        calls = [start(channel, item) for item in stalled]
        ended = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: ended.release())
        try:
            assert all(ended.acquire(timeout=20) for _ in range(7))
            refused = [call for call in calls if call.done()]
            assert len(refused) == 7
            assert all("trunk.call-memory-per-client" in refusal_of(call) for call in refused)
            assert_unharmed(honest)
        finally:
            for item in stalled:
                item.end()


def test_share_is_free_again_when_the_calls_have_ended() -> None:
    with evaluation(Limits(calls=1, call_bytes=100)) as (channel, grant, honest):
        for _ in range(3):
            assert_unharmed(honest)  # 48 bytes each
        with pytest.raises(TrunkRefused, match="trunk.call-memory-per-client"), torch.no_grad():
            honest(torch.ones(1, 5, HIDDEN))  # 120 bytes
        assert_unharmed(honest)


def test_rows_times_positions_of_a_call_are_bounded() -> None:
    with evaluation(Limits(call_positions=8)) as (_, _, honest):
        with torch.no_grad():
            honest(torch.ones(2, 4, HIDDEN))
            with pytest.raises(TrunkRefused, match="trunk.max-call-positions"):
                honest(torch.ones(3, 3, HIDDEN))


def test_window_deadline_fires_on_time_while_eight_calls_compute() -> None:
    """The compute thread is kept busy; who waits for the window is told within a second."""
    busy, free = threading.Event(), threading.Event()
    with closing(make_toy_engine()) as engine:

        def hold(*_: object) -> None:
            busy.set()
            assert free.wait(30)

        engine.begin_round(make_plan((0, 1, 2), window_seconds=1.0, join_seconds=30.0))
        clients = [ToyClient(engine, slot, 2) for slot in range(3)]
        opened = time.monotonic()  # of the window: the last has joined
        hidden = torch.ones(1, 4, 3)
        clients[HONEST].forward(hidden)
        clients[HONEST].backward(hidden, num_tokens=4.0)
        engine.compute.trunk.register_forward_pre_hook(hold)

        def attack(index: int) -> None:
            with suppress(RoundAborted):  # but for the one that computes, which is answered
                clients[ATTACKER].forward(hidden, 0, index, digest=bytes([index]))

        attackers = [threading.Thread(target=attack, args=(index,)) for index in range(8)]
        try:
            for thread in attackers:
                thread.start()
            assert busy.wait(20)
            with pytest.raises(RoundAborted, match="within 1 s"):  # it waits for the next version
                clients[HONEST].forward(hidden, 1, timeout=60.0)
            assert time.monotonic() - opened < 2.0
            assert not free.is_set()  # the eight are still there
        finally:
            free.set()
            for thread in attackers:
                thread.join(20)
        engine.begin_round(make_plan((0,), attempt=1))  # rolled back, and open for the next
        assert engine.status().version == 0
