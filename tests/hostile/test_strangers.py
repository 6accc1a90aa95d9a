"""Somebody without a credential holds no worker, learns nothing, and leaves a trail."""

import logging
import logging.handlers
import queue
import threading
from collections.abc import Iterator

import grpc
import pytest
import torch

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from flower_split.wire.sending import Outgoing
from tests.hostile.enemy import http2_forwards
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)

STREAMS = ("Forward", "Backward")
CONTROL = (
    "OpenSession",
    "WaitVersion",
    "CloseSession",
    "BeginRound",
    "PrepareRound",
    "CommitRound",
    "AbortRound",
    "Status",
)
NO_CREDENTIAL = {
    "none": (),
    "empty": bearer(""),
    "unknown": bearer("a token that nobody has"),
    "other-scheme": (("authorization", "Basic token-0"),),
    "nearly": bearer("token-0 "),
    "other-case": bearer("TOKEN-0"),
}


class Silence:
    """A stream of requests that sends nothing until it is let go."""

    def __init__(self) -> None:
        self._end: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._end.get()
        raise StopIteration

    def end(self) -> None:
        self._end.put(None)


def outcome(channel: grpc.Channel, method: str, metadata: object, frames: list[bytes]) -> tuple:
    """What a caller gets to see: status, text, and the typed refusal."""
    call = channel.stream_stream(f"/{SERVICE}/{method}")(
        iter(frames), timeout=10, metadata=metadata
    )
    with pytest.raises(grpc.RpcError):
        list(call)
    return call.code(), call.details(), tuple(call.trailing_metadata() or ())


def test_every_call_of_a_stranger_gets_the_same_answer_whatever_it_names() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as control, remote(port) as honest:
        epoch, _ = control.begin_round(plan())
        grant = honest.open(1)
        answers = set()
        with open_channel(f"127.0.0.1:{port}") as channel:
            for metadata in NO_CREDENTIAL.values():
                for session in (grant.session, "0" * 32):
                    for named in (epoch, epoch ^ 1):
                        header = pb.ForwardHeader(session=session, trunk_epoch=named)
                        frames = list(Outgoing(pb.Header(forward=header), {}).frames())
                        answers.add(outcome(channel, "Forward", metadata, frames))
                for method in (*STREAMS, *CONTROL, "GetAdapter", "NoSuchMethod"):
                    answers.add(outcome(channel, method, metadata, []))
        assert len(answers) == 1
        code, text, _ = answers.pop()
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "experiment" not in text and "restarted" not in text
        status = control.status()
        assert (status.phase, status.version) == ("open", 0)  # nothing has changed


def test_abort_of_a_round_is_told_to_its_participants_alone() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan())
        control.abort_round("e", 1, 0, "the reason of the abort")
        with remote(port, token="nobody's") as stranger:
            with pytest.raises(TrunkRefused) as refused:
                stranger.open(1)
    assert refused.value.reason is RefusalReason.UNAUTHENTICATED
    assert "the reason of the abort" not in str(refused.value)


@pytest.mark.parametrize("method", ["Forward", "Backward", "OpenSession", "Status", "GetAdapter"])
def test_silent_streams_of_strangers_hold_no_worker(method: str) -> None:
    """Forty silent calls on eight workers; the honest client's calls pass beside them."""
    with served(make_engine(TinyTrunk()), max_workers=8) as port, coordinator(port) as control:
        control.begin_round(plan())
        with open_channel(f"127.0.0.1:{port}") as channel, remote(port) as honest:
            silences = [Silence() for _ in range(40)]
            calls = [
                channel.stream_stream(f"/{SERVICE}/{method}")(silence, timeout=60)
                for silence in silences
            ]
            try:
                honest.open(1)
                hidden = torch.ones(1, 2, HIDDEN)
                with honest.micro_batch(0, 0, num_tokens=2, loss_denominator=2.0, last=True):
                    honest(hidden).sum().backward()
                assert control.prepare_round("e", 1, 0).optimizer_steps == 1
                # Each of the attack's calls was made, and was answered without a request.
                assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
            finally:
                for silence in silences:
                    silence.end()


def test_silent_health_checks_hold_four_workers_at_most() -> None:
    with served(make_engine(TinyTrunk()), max_workers=8) as port, coordinator(port) as control:
        with open_channel(f"127.0.0.1:{port}") as channel:
            silences = [Silence() for _ in range(20)]
            check = channel.stream_stream("/grpc.health.v1.Health/Check")
            calls = [check(silence, timeout=60) for silence in silences]
            answered = threading.Semaphore(0)
            for call in calls:
                call.add_done_callback(lambda _: answered.release())
            try:
                assert all(answered.acquire(timeout=20) for _ in range(16))
                assert control.status().phase == "idle"
                done = [call for call in calls if call.done()]
                assert len(done) == 16
                assert {call.code() for call in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            finally:
                for silence in silences:
                    silence.end()


def test_participant_waits_no_longer_than_the_trunk_allows() -> None:
    with (
        served(make_engine(TinyTrunk()), max_call_seconds=0.5) as port,
        coordinator(port) as control,
        remote(port) as client,
    ):
        control.begin_round(plan())
        grant = client.open(1)
        request = pb.WaitVersionRequest(
            session=grant.session, trunk_epoch=grant.epoch, version=10**6
        )
        with open_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/WaitVersion")
            with pytest.raises(grpc.RpcError) as ended:
                call(request.SerializeToString(), timeout=3600, metadata=bearer("token-0"))
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_refused_calls_leave_one_line_a_second_and_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    log = RefusalLog(clock=lambda: now[0])
    error = TrunkRefused(RefusalReason.UNAUTHENTICATED, f"with {COORDINATOR_TOKEN} in its text")
    with caplog.at_level(logging.INFO):
        for _ in range(90):
            log.note("ipv4:10.0.0.7:5", "Status", error)
        now[0] = 1.5
        log.note("ipv4:10.0.0.8:6", "Forward", error)
    assert [record.getMessage() for record in caplog.records] == [
        "refused Status from ipv4:10.0.0.7:5: UNAUTHENTICATED (0 more since the last line, 1 in all)",
        "refused Forward from ipv4:10.0.0.8:6: UNAUTHENTICATED (89 more since the last line, 91 in "
        "all)",
    ]
    assert log.counts == {("Status", "UNAUTHENTICATED"): 90, ("Forward", "UNAUTHENTICATED"): 1}


def test_refusal_over_the_wire_is_in_the_log_with_its_peer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), served(FakeEngine()) as port:
        with coordinator(port, token="a wrong token") as stranger:
            with pytest.raises(TrunkRefused):
                stranger.status()
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("refused")]
    assert line.startswith("refused Status from ipv4:127.0.0.1:") and "a wrong token" not in line


def test_header_that_is_no_utf8_writes_nothing_of_itself_into_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else the header, which may be a token's, is logged by gRPC, with a traceback for every call."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    logging.getLogger("flower_split").addHandler(handler)
    try:
        with (
            served(make_engine(TinyTrunk())) as port,
            http2_forwards(port, "secret\udcff", [bytes(5)]),
        ):
            while "refused Forward" not in records.get(timeout=20).getMessage():
                pass
    finally:
        logging.getLogger("flower_split").removeHandler(handler)
    assert not any(record.exc_info for record in caplog.records)
    assert "secret" not in caplog.text
