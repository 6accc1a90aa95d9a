"""A call that falls silent gives its place back, whatever deadline its caller has chosen."""

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.limits import Limits
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from flower_split.wire.sending import Outgoing
from tests.hostile.enemy import http2_forwards
from tests.hostile.test_quotas import ATTACKER, Stalled, assert_unharmed, evaluation
from tests.hostile.test_strangers import Silence
from tests.support.loopback import HIDDEN, TinyTrunk, coordinator, make_engine, plan, remote, served

BRIEF = 0.3  # seconds
CONTROL = ("OpenSession", "WaitVersion", "ShortenPlan", "CloseSession", "ShareMemory")
COORDINATORS = ("BeginRound", "PrepareRound", "CommitRound", "AbortRound", "Status", "GetAdapter")


@contextmanager
def silent(channel: grpc.Channel, methods: list[str], path: str = SERVICE) -> Iterator[list]:
    """A silent stream for each method, with a deadline of a day, as the attacker."""
    silences = [Silence() for _ in methods]
    try:
        yield [
            channel.stream_stream(f"/{path}/{method}")(
                silence, timeout=86_000, metadata=bearer(f"token-{ATTACKER}")
            )
            for method, silence in zip(methods, silences, strict=True)
        ]
    finally:
        for silence in silences:
            silence.end()


def code_of(call: grpc.Call, seconds: float = 20.0) -> grpc.StatusCode:
    """The status of a call that somebody else ends."""
    ended = threading.Event()
    if call.add_callback(ended.set):
        assert ended.wait(seconds), "the call goes on"
    return call.code()


@pytest.mark.parametrize("method", ["Forward", "Backward", "FinishStep", *CONTROL])
def test_silent_call_ends_and_its_place_is_free(method: str) -> None:
    with evaluation(Limits(calls=1, first_frame_seconds=BRIEF)) as (channel, _, honest):
        for _ in range(3):  # more than places, one after the other
            with silent(channel, [method]) as (call,):
                assert code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
                assert "trunk.first-frame-timeout" in call.details()
        assert_unharmed(honest)


@pytest.mark.parametrize("methods", [CONTROL, COORDINATORS, ("Forward", "Backward")])
def test_silent_calls_of_a_participant_leave_workers_for_the_others(methods: tuple) -> None:
    engine = make_engine(TinyTrunk())
    limits = Limits(calls=2)  # the silence lasts for longer than the test
    with (
        served(engine, max_workers=16, limits=limits) as port,
        coordinator(port) as control,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        control.begin_round(plan(2, evaluate=True))
        with silent(channel, [methods[i % len(methods)] for i in range(60)]) as calls:
            with remote(port) as honest:
                honest.open(0, evaluate=True)
                assert_unharmed(honest)
            assert control.status().phase != "idle"
            refused = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED}
            codes = [call.code() for call in calls if call.done()]
            assert len(codes) >= 60 - 6 and set(codes) <= refused


def test_silent_health_checks_give_their_places_back() -> None:
    limits = Limits(first_frame_seconds=BRIEF)
    with (
        served(make_engine(TinyTrunk()), max_workers=8, limits=limits) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
        silent(channel, ["Check"] * 4, "grpc.health.v1.Health") as calls,
    ):
        assert {code_of(call) for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=""), timeout=5
        )
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_call_that_stalls_after_its_header_is_cut_off_by_the_trunks_own_time() -> None:
    hidden = torch.ones(1, 40_000, HIDDEN)
    with evaluation(Limits(calls=1), max_call_seconds=BRIEF) as (channel, grant, honest):
        stalled = Stalled(grant.session, grant.epoch, hidden)
        try:
            call = channel.stream_stream(f"/{SERVICE}/Forward")(
                stalled, timeout=86_000, metadata=bearer(f"token-{ATTACKER}")
            )
            began = time.monotonic()
            assert code_of(call) is grpc.StatusCode.CANCELLED
            assert time.monotonic() - began < 10
            assert_unharmed(honest)
        finally:
            stalled.end()


def test_replies_that_nobody_reads_hold_a_share_and_are_cut_off() -> None:
    """Each reply has 20 kB; on the attacker's connection three go through, and the others wait."""
    hidden = torch.ones(1, 850, HIDDEN)
    engine, limits = make_engine(TinyTrunk()), Limits(calls=8)
    with (
        served(engine, limits=limits, max_call_seconds=4.0) as port,
        coordinator(port) as control,
        remote(port) as honest,
        remote(port, slot=ATTACKER) as attacker,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        control.begin_round(plan(2, evaluate=True))
        honest.open(0, evaluate=True)
        grant = attacker.open(0, evaluate=True)
        header = pb.ForwardHeader(session=grant.session, trunk_epoch=grant.epoch, mode=pb.EVALUATE)
        (frame,) = Outgoing(pb.Header(forward=header), {"hidden_states": hidden}).frames()
        message = struct.pack(">BI", 0, len(frame)) + frame
        with http2_forwards(port, f"token-{ATTACKER}", [message] * 14):
            call = channel.stream_stream(f"/{SERVICE}/Forward")
            asked = bearer(f"token-{ATTACKER}")
            end = time.monotonic() + 4.0  # the last of the fourteen may be on its way
            with pytest.raises(grpc.RpcError) as refused:
                while time.monotonic() < end:
                    list(call(iter([frame]), timeout=20, metadata=asked))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "8 replies unread" in refused.value.details()
            assert_unharmed(honest)
            end = time.monotonic() + 15.0
            while True:  # until those that nobody reads are cut off
                try:
                    assert len(list(call(iter([frame]), timeout=20, metadata=asked))) == 1
                    break
                except grpc.RpcError:
                    assert time.monotonic() < end
                    threading.Event().wait(0.2)
