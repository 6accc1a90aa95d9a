"""Targets of the live servicer: what a participant calls, and what somebody without a credential does.

Both go over gRPC to a trunk on loopback. What differs from trunk to trunk (its epoch, the session, the
attempt) stands in an input as a number of as many bytes, and is put in its place before the call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import transformers

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.grpc_options import PROOF, Metadata, open_channel
from tests.hostile.fuzz import Findings, FuzzedTrunk, listening
from tests.hostile.fuzz_calls import Known
from tests.hostile.targets.messages import ANYWHERE, UNPACED, Ended, calls_of
from tests.hostile.targets.target import Found, Target, joined, parts_of
from tests.support.loopback import served

FIRST_ATTEMPT = 1 << 14  # from here on an attempt has three bytes, as the stand-in has
# UNAVAILABLE: its connection ended, as it does after headers that are too large.
_REFUSED = frozenset({"UNAUTHENTICATED", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})


def as_varint(number: int) -> bytes:
    """Return a number as protobuf writes it."""
    return pb.ForwardHeader(trunk_epoch=number).SerializeToString()[1:]


def addressed(data: bytes, from_one: Known, to: Known) -> bytes:
    """Return an input with what ``to`` was told in the place of what ``from_one`` was."""
    data = data.replace(from_one.session.encode(), to.session.encode())
    data = data.replace(as_varint(from_one.epoch), as_varint(to.epoch))
    return data.replace(as_varint(from_one.attempt), as_varint(to.attempt))


@contextmanager
def member() -> Iterator[Callable[[bytes], None]]:
    """Calls of a participant to a trunk of a llama, in a round of their own."""
    transformers.utils.logging.set_verbosity_error()
    findings = Findings()
    trunk = FuzzedTrunk("llama", findings, FIRST_ATTEMPT)
    with (
        listening(findings),
        served(trunk.engine, max_call_seconds=0.05, limits=UNPACED) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):

        def run(data: bytes) -> None:
            known = trunk.begin(channel, data[0] if data else 0)
            before = sum(n for (_, code), n in findings.statuses.items() if code == "OK")
            calls = calls_of(addressed(data, ANYWHERE, known))
            for call in calls:
                trunk.make(channel, call, known.token)
            if findings.internal or findings.tracebacks:
                raise Found("\n".join(findings.internal + findings.tracebacks))
            after = sum(n for (_, code), n in findings.statuses.items() if code == "OK")
            if after - before < len(calls):
                raise Ended(grpc.StatusCode.FAILED_PRECONDITION, "a call of these was refused")

        yield run
        trunk.finish()
        if findings.changed:
            raise Found("the weights have changed")


def stranger_input(path: str, authorization: str, proof: bytes, *frames: bytes) -> bytes:
    """Return the input of one call of a stranger."""
    return joined([path.encode(), authorization.encode(), proof, *frames])


@contextmanager
def stranger() -> Iterator[Callable[[bytes], None]]:
    """One call of somebody without a credential: path, authorization, proof, then its frames."""
    transformers.utils.logging.set_verbosity_error()
    findings = Findings()
    trunk = FuzzedTrunk("llama", findings)
    with (
        listening(findings),
        served(trunk.engine, max_call_seconds=0.05, limits=UNPACED) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        known = trunk.begin(channel)

        def run(data: bytes) -> None:
            path, authorization, proof, *frames = [*parts_of(data), b"", b"", b""]
            text = _header_text(authorization)
            if known.token in text:
                return  # it would have to guess it
            metadata: Metadata = (("authorization", text), (PROOF, proof)) if text else ()
            try:
                call = channel.stream_stream("/" + _header_text(path).lstrip("/"))
                for _ in call(iter(frames), timeout=20.0, metadata=metadata):
                    pass
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
            if findings.tracebacks:
                raise Found("\n".join(findings.tracebacks))
            if b"Health" in path and code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"):
                return
            if code not in _REFUSED:
                raise Found(f"a stranger is answered with {code}")
            raise Ended(grpc.StatusCode.UNAUTHENTICATED, code)

        yield run
        trunk.finish()
        if findings.changed:
            raise Found("the weights have changed")


def _header_text(part: bytes) -> str:
    """Return what HTTP/2 lets stand in a header of ``part``."""
    return bytes(byte for byte in part if 0x20 <= byte < 0x7F).decode().strip()


MEMBER = Target("member", (Ended,), member, corpus="calls")
STRANGER = Target("stranger", (Ended,), stranger)
