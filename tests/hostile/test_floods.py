"""Floods: of connections, of calls that are each refused. They are bounded, and others are served."""

import socket
from contextlib import suppress

import grpc

from flower_split.trunk.service.limits import Limits
from flower_split.trunk.service.pacing import PARTICIPANT, Rate
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from tests.hostile.test_quotas import assert_unharmed, evaluation
from tests.hostile.test_strangers import Silence
from tests.support.loopback import TinyTrunk, coordinator, make_engine, served

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def is_open(one: socket.socket) -> bool:
    """Whether the trunk speaks HTTP/2 on it: it sends its settings."""
    with suppress(ConnectionError):
        return bool(one.recv(9))
    return False


def test_connections_beyond_the_bound_are_closed_and_their_places_come_back() -> None:
    with served(make_engine(TinyTrunk()), limits=Limits(connections=10)) as port:
        sockets = []
        for _ in range(30):
            one = socket.create_connection(("127.0.0.1", port), timeout=20)
            with suppress(ConnectionError):
                one.sendall(PREFACE)
            sockets.append(one)
        assert sum(is_open(one) for one in sockets) == 10
        for one in sockets:
            one.close()
        with coordinator(port) as control:  # it asks again until a place is free
            assert control.status().phase == "idle"


def test_participant_whose_calls_are_each_refused_is_refused_unread_and_others_are_served() -> None:
    slowly = Rate(burst=5, per_second=1.0)  # of answers: a busy machine is slow, too
    with evaluation(Limits(calls=3, refusals=slowly)) as (channel, _, honest):
        stub = channel.stream_stream(f"/{SERVICE}/Forward")
        details = set()
        for _ in range(8):
            call = stub(iter([b"\xff" * 9]), timeout=60, metadata=bearer("token-1"))
            with suppress(grpc.RpcError):
                list(call)
            details.add((call.code(), call.details()))
        codes = {code for code, _ in details}
        assert codes == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert any("refused a moment ago" in text for _, text in details)
        assert_unharmed(honest)


def test_calls_above_a_share_hold_no_worker_while_they_wait_to_be_refused() -> None:
    with evaluation(Limits(calls=3), max_workers=8) as (channel, _, honest):
        stub = channel.stream_stream(f"/{SERVICE}/Forward")
        silences = [Silence() for _ in range(3 + 2 * PARTICIPANT.burst)]
        calls = [stub(one, timeout=60, metadata=bearer("token-1")) for one in silences]
        try:
            assert_unharmed(honest)  # three of eight workers are held, and none by the others
            assert sum(not call.done() for call in calls) >= 3
        finally:
            for one in silences:
                one.end()


REFUSED_STREAM = "RST_STREAM with error code 7"
"""HTTP/2's own refusal of a stream above a connection's limit, which never becomes a call."""


def test_strangers_flood_is_answered_in_one_wording_and_the_coordinator_is_served() -> None:
    with (
        served(make_engine(TinyTrunk()), max_workers=8) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = channel.stream_stream(f"/{SERVICE}/Forward")
        calls = [stub(iter([b""]), timeout=60, metadata=bearer("x")) for _ in range(400)]
        with coordinator(port) as control:
            assert control.status().phase == "idle"
        answers = set()
        for call in calls:
            with suppress(grpc.RpcError):
                list(call)
            answers.add((call.code(), call.details()))
        said = {answer for answer in answers if REFUSED_STREAM not in str(answer[1])}
        assert {code for code, _ in said} == {grpc.StatusCode.UNAUTHENTICATED}
        assert len(said) == 1
