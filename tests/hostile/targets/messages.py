"""Targets of one message: its codec, and the calls that are made of its frames."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import grpc
import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import (
    BackwardCall,
    CallResult,
    FinishCall,
    FinishResult,
    ForwardCall,
    SessionGrant,
)
from flower_split.trunk.service.client_calls import ClientCalls
from flower_split.trunk.service.handlers import FirstFrames, Quotas
from flower_split.trunk.service.limits import Limits
from flower_split.trunk.service.pacing import Rate
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.codecs import Coded, make_codec
from flower_split.wire.grpc_options import bearer
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from tests.hostile.fuzz_calls import Call, Known
from tests.hostile.targets.target import Found, Target, joined, parts_of
from tests.support.loopback import FakeEngine

KINDS = {
    "": None,
    "int8 ": Coded(make_codec("int8"), "hidden_states"),
    "rows ": Coded(make_codec("native"), "hidden_states", without_zeros=True),
}
METHODS = (
    "Forward",
    "Backward",
    "FinishStep",
    "OpenSession",
    "WaitVersion",
    "ShortenPlan",
    "CloseSession",
    "ShareMemory",
)
MAX_BYTES = 1 << 22
TOKEN = "member"
# What calls of the corpus are made of. A live trunk's own come in their place, each of as many bytes on
# the wire, so that an input is the same one everywhere.
ANYWHERE = Known(
    session="5e551011" * 4,
    epoch=0x5555_5555_5555_5555,
    token=TOKEN,
    server_round=1,
    attempt=0x5555,
    version=0,
    hidden_size=32,
    heads=4,
)
_CALLS = 8  # of one input

# No caller is turned away for how many calls it makes.
UNPACED = Limits(refusals=Rate(burst=10**9, per_second=1e9))


# ---- codec


def read_message(frames: Sequence[bytes], kind: str) -> None:
    """Read one message by a codec, and what was accepted once more.

    Raises:
        CodecError: It is not well formed.
        Found: It is accepted, and is another one when it is sent on.
    """
    received = Incoming(iter(frames)).receive(MAX_BYTES, coded=KINDS[kind], digest=True)
    if not kind:
        again = Outgoing(pb.Header(reply=pb.ReplyHeader()), received.tensors)
        found = Incoming(again.frames()).receive(MAX_BYTES).tensors
        if list(map(_bytes, found.items())) != list(map(_bytes, received.tensors.items())):
            raise Found("a message is another one when it is sent on")


def _bytes(named: tuple[str, Tensor]) -> tuple[str, torch.dtype, torch.Size, bytes]:
    name, tensor = named
    return name, tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()


def codec_input(frames: Sequence[bytes], kind: str = "") -> bytes:
    """Return the input of one message."""
    return bytes([list(KINDS).index(kind)]) + joined(frames)


@contextmanager
def codec() -> Iterator[Callable[[bytes], None]]:
    """One message: which codec, then its frames."""
    kinds = list(KINDS)

    def run(data: bytes) -> None:
        read_message(parts_of(data[1:]), kinds[data[0] % len(kinds)] if data else "")

    yield run


# ---- frames


def calls_input(calls: Sequence[Call], plan: int = 0) -> bytes:
    """Return the input of calls: the number of their round's plan, then the frames.

    Before each frame stands its method's number, or 0 where it goes on with the call before.
    """
    parts = []
    for call in calls:
        for index, frame in enumerate(call.frames):
            parts.append(bytes([0 if index else 1 + METHODS.index(call.method)]) + frame)
    return bytes([plan]) + joined(parts)


def calls_of(data: bytes) -> list[Call]:
    """Return the calls of an input."""
    found: list[tuple[str, list[bytes]]] = []
    for part in parts_of(data[1:]):
        method = part[0] % (len(METHODS) + 1) if part else 0
        if method or not found:
            found.append((METHODS[max(method, 1) - 1], []))
        found[-1][1].append(part[1:])
    return [Call(method, frames) for method, frames in found[:_CALLS]]


class Ended(grpc.RpcError):
    """A call was ended with a status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.status = code


class CallContext:
    """What a handler is told of its call, without a server."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(TOKEN)

    def time_remaining(self) -> float:
        return 20.0

    def peer(self) -> str:
        return "fuzz"

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False  # it is over as soon as it is answered

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def cancel(self) -> None:
        pass

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Ended(code, text)


class Echo(FakeEngine):
    """Answers at once, whatever arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = ANYWHERE.epoch

    def open_session(self, *arguments: object) -> SessionGrant:
        grant = super().open_session(*arguments)
        return replace(grant, session=ANYWHERE.session)

    def forward(self, call: ForwardCall) -> CallResult:
        return CallResult(call.tensors.get("hidden_states", torch.zeros(1)), 10, 0.0, 0.0)

    def backward(self, call: BackwardCall) -> CallResult:
        return CallResult(call.grad, 10, 0.0, 0.0)

    def finish_step(self, call: FinishCall) -> FinishResult:
        return FinishResult(1.0, 1.0, call.gradients, 10, 0.0, 0.0)

    def shorten_plan(self, session: str, epoch: int, planned_steps: int) -> None:
        self._note("shorten_plan", session, epoch, planned_steps)


@contextmanager
def frames() -> Iterator[Callable[[bytes], None]]:
    """The handlers of a client's calls, before an engine that answers anything."""
    refusals, first_frames = RefusalLog(), FirstFrames(5.0, 2)
    quotas = Quotas(64, UNPACED, 60.0)
    engine = Echo()
    calls = ClientCalls(engine, quotas, MAX_BYTES, 60.0, refusals, first_frames)
    handlers = calls.handlers()
    context = CallContext()
    opening = pb.OpenSessionRequest(fingerprint=engine.fingerprint).SerializeToString()

    def make(call: Call) -> None:
        reply = handlers[call.method].stream_stream(iter(call.frames), context)
        for _ in reply:
            pass

    def run(data: bytes) -> None:
        engine.calls.clear()
        ended: Ended | None = None
        make(Call("OpenSession", [opening]))
        for call in calls_of(data):
            try:
                make(call)
            except Ended as error:
                if error.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                    raise Found(f"{call.method}: {error}") from error
                ended = error
        if ended is not None:
            raise ended

    try:
        yield run
    finally:
        calls.close()
        first_frames.close()
        refusals.pace.close()


CODEC = Target("codec", (CodecError,), codec)
FRAMES = Target("frames", (Ended,), frames, corpus="calls")
