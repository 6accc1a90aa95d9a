"""The RPC shell: who may call, what is refused and how it looks on the other side, who waits."""

import datetime
import ipaddress
import logging
import threading
import time
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.errors import (
    CodecError,
    ConfigError,
    RefusalReason,
    RoundAborted,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from flower_split.wire.sending import Outgoing
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    FINGERPRINT,
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


def raising(error: Exception, method: str = "forward") -> FakeEngine:
    def on_call(called: str, number: int) -> None:
        if called == method:
            raise error

    return FakeEngine(on_call)


def evaluate_once(port: int) -> torch.Tensor:
    with remote(port) as trunk, torch.no_grad():
        trunk.open(1)
        return trunk(torch.ones(1, 2, HIDDEN))


@pytest.mark.parametrize("reason", list(RefusalReason))
def test_refusal_of_the_engine_arrives_typed_with_its_message(reason: RefusalReason) -> None:
    message = "rule, value, place and remedy — in any script: ünïcode"
    with served(raising(TrunkRefused(reason, message))) as port:
        with pytest.raises(TrunkRefused) as caught:
            evaluate_once(port)
    assert caught.value.reason is reason and str(caught.value) == message


def test_refusal_status_codes_are_those_of_the_protocol() -> None:
    def code_of(reason: RefusalReason) -> grpc.StatusCode:
        with served(raising(TrunkRefused(reason, "no"), "status")) as port:
            with open_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/{SERVICE}/Status")(
                        b"", timeout=5, metadata=bearer(COORDINATOR_TOKEN)
                    )
        return caught.value.code()

    assert code_of(RefusalReason.STALE_VERSION) is grpc.StatusCode.FAILED_PRECONDITION
    assert code_of(RefusalReason.OVER_BUDGET) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code_of(RefusalReason.UNAUTHENTICATED) is grpc.StatusCode.UNAUTHENTICATED


def test_very_long_refusal_is_cut_and_still_typed() -> None:
    error = TrunkRefused(RefusalReason.FINGERPRINT_MISMATCH, "x" * 100_000)
    with served(raising(error, "open_session")) as port, pytest.raises(TrunkRefused) as caught:
        evaluate_once(port)
    assert caught.value.reason is RefusalReason.FINGERPRINT_MISMATCH
    assert str(caught.value) == "x" * 2000


def test_aborted_round_arrives_as_round_aborted() -> None:
    with served(raising(RoundAborted("window 3 has no quorum"))) as port:
        with pytest.raises(RoundAborted, match="window 3 has no quorum"):
            evaluate_once(port)


def test_unexpected_error_gives_an_incident_and_not_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR), served(raising(RuntimeError("secret 0.123"))) as port:
        with pytest.raises(TrunkError, match="INTERNAL.*incident [0-9a-f]{8}") as caught:
            evaluate_once(port)
    assert type(caught.value) is TrunkError and "secret" not in str(caught.value)
    (record,) = [r for r in caplog.records if "incident" in r.getMessage()]
    incident = record.getMessage().rpartition(" ")[2]
    assert incident in str(caught.value) and record.exc_info is not None


def test_session_calls_with_another_token_are_refused() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk, remote(port, slot=1) as thief:
        trunk.open(1)
        thief._calls.grant, thief._calls.max_tensor_bytes = trunk.grant, 1 << 20
        with pytest.raises(TrunkRefused) as caught, torch.no_grad():
            thief(torch.ones(1, 1, HIDDEN))
        assert caught.value.reason is RefusalReason.UNAUTHENTICATED
        with pytest.raises(TrunkRefused):
            thief.wait_version(0)
    assert engine.count("forward") == engine.count("wait_version") == 0


def test_session_that_was_never_opened_is_refused() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        with served(FakeEngine()) as other_port, remote(other_port) as other:
            trunk._calls.grant, trunk._calls.max_tensor_bytes = other.open(1), 1 << 20
        with pytest.raises(TrunkRefused) as caught, torch.no_grad():
            trunk(torch.ones(1, 1, HIDDEN))
        assert caught.value.reason is RefusalReason.UNKNOWN_SESSION


def test_session_of_an_earlier_process_is_refused_as_wrong_epoch() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk, torch.no_grad():
        trunk.open(1)
        engine.epoch += 1
        with pytest.raises(TrunkRefused, match="restarted") as caught:
            trunk(torch.ones(1, 1, HIDDEN))
        assert caught.value.reason is RefusalReason.WRONG_EPOCH


def test_coordinator_calls_need_the_coordinator_token() -> None:
    engine = make_engine(TinyTrunk())
    with served(engine) as port, coordinator(port, token="token-0") as stranger:
        for call in (
            lambda: stranger.begin_round(plan()),
            lambda: stranger.prepare_round("e", 1, 0),
            lambda: stranger.commit_round("e", 1, 0),
            lambda: stranger.abort_round("e", 1, 0, "because"),
            stranger.status,
            stranger.get_adapter,
        ):
            with pytest.raises(TrunkRefused, match="coordinator") as caught:
                call()
            assert caught.value.reason is RefusalReason.UNAUTHENTICATED


def raw_call(port: int, method: str, frames: list[bytes], **options: object) -> list[bytes]:
    with open_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/{method}")
        return list(call(iter(frames), **{"timeout": 5, "metadata": bearer("token-0"), **options}))


def forward_frames(session: str = "session-of-token-0", **changes: object) -> list[bytes]:
    values: dict[str, object] = {
        "session": session,
        "trunk_epoch": 7,
        "version": 10,
        "mode": pb.EVALUATE,
    }
    header = pb.ForwardHeader(**{**values, **changes})
    tensors = {"hidden_states": torch.ones(1, 2, HIDDEN)}
    return list(Outgoing(pb.Header(forward=header), tensors).frames())


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([], "before its first frame"),
        ([b"\xff\xff\xff"], "not a valid protobuf"),
        ([*forward_frames(), b"\x7a\x01x"], "announced"),
        (forward_frames(mode=9), "mode number 9"),
        (forward_frames(mode=pb.TRAIN), "key"),
        (list(Outgoing(pb.Header(backward=pb.BackwardHeader()), {}).frames()), "'forward'"),
    ],
)
def test_malformed_forward_is_an_invalid_argument(frames: list[bytes], match: str) -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        with pytest.raises(grpc.RpcError) as caught:
            raw_call(port, "Forward", frames)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert match in caught.value.details() and engine.count("forward") == 0


def test_request_above_the_tensor_limit_is_an_invalid_argument() -> None:
    engine = FakeEngine()
    with served(engine, max_tensor_bytes=10) as port, remote(port) as trunk:
        trunk.open(1)
        with pytest.raises(grpc.RpcError) as caught:
            raw_call(port, "Forward", forward_frames())
    assert "may hold 10 bytes" in caught.value.details()


@pytest.mark.parametrize("method", ["Forward", "Backward", "Status", "GetAdapter", "BeginRound"])
def test_call_without_a_token_is_unauthenticated(method: str) -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        frames = forward_frames()
        if method == "Backward":
            header = pb.BackwardHeader(session="session-of-token-0", trunk_epoch=7)
            frames = list(Outgoing(pb.Header(backward=header), {}).frames())
        with pytest.raises(grpc.RpcError) as caught:
            if method in ("Forward", "Backward"):
                raw_call(port, method, frames, metadata=())
            else:
                with open_channel(f"127.0.0.1:{port}") as channel:
                    if method == "GetAdapter":
                        list(channel.unary_stream(f"/{SERVICE}/{method}")(b"", timeout=5))
                    else:
                        channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_call_without_a_deadline_is_refused() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        with pytest.raises(grpc.RpcError, match="must have a deadline"):
            raw_call(port, "Forward", forward_frames(), timeout=None)


def test_backward_with_a_non_finite_count_is_an_invalid_argument() -> None:
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        header = pb.BackwardHeader(
            session="session-of-token-0", trunk_epoch=7, num_tokens=float("nan")
        )
        frames = list(
            Outgoing(pb.Header(backward=header), {"trunk_output_grad": torch.ones(1)}).frames()
        )
        with pytest.raises(grpc.RpcError, match="num_tokens must be finite"):
            raw_call(port, "Backward", frames)


def test_health_service_says_serving() -> None:
    with served(FakeEngine()) as port, open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_waiting_forwards_never_starve_the_backward_that_ends_their_wait() -> None:
    """Twenty forwards wait on eight workers until one backward has come."""
    backward_came = threading.Event()
    waiting = threading.Semaphore(0)
    in_time: list[bool] = []

    def on_call(method: str, number: int) -> None:
        if method == "backward":
            backward_came.set()
        elif method == "forward" and number > 1:
            waiting.release()
            in_time.append(backward_came.wait(8))

    with served(FakeEngine(on_call), max_workers=8) as port, remote(port) as trunk:
        trunk.open(1)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(torch.ones(1, 1, HIDDEN, requires_grad=True))
        done: list[int] = []

        def forward(index: int) -> None:
            with torch.no_grad():
                trunk(torch.ones(1, 1, HIDDEN))
            done.append(index)

        threads = [threading.Thread(target=forward, args=(index,)) for index in range(20)]
        for thread in threads:
            thread.start()
        for _ in range(6):  # three quarters of the workers are now held by forwards
            assert waiting.acquire(timeout=10)
        output.sum().backward()
        for thread in threads:
            thread.join(20)
    assert sorted(done) == list(range(20))
    assert len(in_time) == 20 and all(in_time)


def test_plain_text_beyond_loopback_is_refused_on_both_sides() -> None:
    with pytest.raises(ConfigError, match="tls-certificate"):
        TrunkServer(FakeEngine(), coordinator_token="t", listen="0.0.0.0:0")
    with pytest.raises(ConfigError, match="root-certificates"):
        RemoteTrunk("10.1.2.3:50", token="t", fingerprint={}, mode="joint", call_timeout=1.0)


def test_server_without_token_or_with_half_a_key_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="token"):
        TrunkServer(FakeEngine(), coordinator_token="")
    with pytest.raises(ConfigError, match="both"):
        TrunkServer(FakeEngine(), coordinator_token="t", tls_certificate="c.pem")
    with pytest.raises(ConfigError, match="readable PEM"):
        TrunkServer(FakeEngine(), coordinator_token="t", tls_certificate="no", tls_key="no")


def test_second_server_on_a_taken_port_is_refused() -> None:
    with served(FakeEngine()) as port:
        second = TrunkServer(FakeEngine(), coordinator_token="t", listen=f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="cannot listen"):
            second.start()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own CA, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trunk")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    files[1].chmod(0o600)
    return files


def test_tls_client_with_the_ca_is_served_and_one_without_is_not(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    engine = FakeEngine()
    with served(engine, tls_certificate=str(certificate), tls_key=str(key)) as port:
        for roots in (str(certificate), certificate.read_text()):  # a path, and the text itself
            with remote(port, root_certificates=roots) as trunk, torch.no_grad():
                trunk.open(1)
                assert torch.equal(trunk(torch.ones(1, 1, HIDDEN)), torch.full((1, 1, HIDDEN), 2.0))
        with remote(port, call_timeout=1.0) as trunk, pytest.raises(TrunkUnavailable):
            trunk.open(1)
    assert engine.count("open_session") == 2


def test_stop_lets_a_call_in_progress_finish_within_the_grace() -> None:
    started, go = threading.Event(), threading.Event()

    def on_call(method: str, number: int) -> None:
        if method == "forward":
            started.set()
            assert go.wait(10)

    server = TrunkServer(FakeEngine(on_call), coordinator_token="t")
    port = server.start()
    results: list[torch.Tensor] = []
    with remote(port, fingerprint=FINGERPRINT) as trunk:
        trunk.open(1)

        def forward() -> None:
            with torch.no_grad():
                results.append(trunk(torch.ones(1, 1, HIDDEN)))

        call = threading.Thread(target=forward)
        call.start()
        assert started.wait(10)
        stop = threading.Thread(target=server.stop, args=(10.0,))
        stop.start()
        go.set()
        call.join(10)
        began = time.monotonic()
        stop.join(10)
    assert len(results) == 1 and time.monotonic() - began < 5


def test_codec_error_of_the_server_is_a_refusal_of_the_request() -> None:
    with served(raising(CodecError("bad tensor"))) as port, pytest.raises(TrunkRefused) as caught:
        evaluate_once(port)
    assert caught.value.reason is RefusalReason.INVALID_REQUEST
    assert "bad tensor" in str(caught.value)
