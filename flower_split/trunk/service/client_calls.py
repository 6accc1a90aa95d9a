"""The clients' calls with tensors of the trunk's service: forwards, backwards, ends of steps.

Each handler reads a call, checks it, makes one value of it for the engine, and frames the reply.

Next: ``flower_split/trunk/engine/engine.py``.
"""

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import grpc
import torch
import xxhash

from flower_split.errors import CodecError
from flower_split.parties.fingerprint import CODEC, GRADIENT_CODEC
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import (
    cache_from_proto,
)
from flower_split.protocol.values import (
    BackwardCall,
    CallResult,
    ContributionKey,
    FinishCall,
    FinishResult,
    ForwardCall,
    ForwardMode,
)
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.client_sessions import ClientSessions
from flower_split.trunk.service.control import ControlCalls
from flower_split.trunk.service.handlers import (
    Answering,
    Context,
    FirstFrames,
    Holding,
    Quotas,
    SessionTokens,
    deadline_of,
)
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.trunk.service.shared_payloads import SharedPayloads, placed_frames
from flower_split.wire.codecs import NATIVE, Coded, WireCodecs, stays_on_device
from flower_split.wire.receiving import Incoming, Received
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import SharedMemory
from flower_split.wire.staging import allocator, arrived, aside, pooled, to_host

_FIELDS = {"Forward": "forward", "Backward": "backward", "FinishStep": "finish_step"}  # of a header

_Said = pb.ForwardHeader | pb.BackwardHeader | pb.FinishStepHeader


@dataclass(frozen=True, slots=True)
class _Entered:
    """A call that has been let in and has arrived in full."""

    header: pb.Header
    session: str
    received: Received
    deadline: float  # on the monotonic clock
    shared: SharedMemory | None  # that its payloads lie in


class ClientCalls:
    """What clients ask of one engine.

    Args:
        engine: What computes.
        quotas: Counts the calls in progress.
        max_tensor_bytes: Limit on the tensors of one call.
        max_call_seconds: Longest that a call may wait, whatever its caller asks for.
        refusals: Notes refused calls.
        first_frames: Reads the first frame of every call.

    Attributes:
        quotas: Counts the calls in progress.

    Raises:
        ConfigError: A codec that the engine's fingerprint names is not installed here.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        quotas: Quotas,
        max_tensor_bytes: int,
        max_call_seconds: float,
        refusals: RefusalLog,
        first_frames: FirstFrames,
    ) -> None:
        self._max_call_seconds = max_call_seconds
        self._refusals = refusals
        self._first_frames = first_frames
        self._engine = engine
        self.quotas = quotas
        self._max_tensor_bytes = max_tensor_bytes
        self._tokens = SessionTokens()
        self._shared = SharedPayloads(engine.knows_token, engine.device)
        self._sessions = ClientSessions(
            engine, self._tokens, self._shared, max_tensor_bytes, max_call_seconds
        )
        names = engine.fingerprint.get(CODEC, NATIVE), engine.fingerprint.get(GRADIENT_CODEC, "")
        self._codecs = WireCodecs.make(*names)
        self._device = engine.device
        self._on_gpu = self._device.type == "cuda"
        self._aside: Callable[[], AbstractContextManager[object]] = (
            partial(aside, self._device) if self._on_gpu else nullcontext
        )
        self._allocate = allocator(self._device)
        self._tracing = PROCESS_TRACING.current

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """Return every method by its name; tensors pass as the bytes they are."""
        control = ControlCalls(self._refusals, self._first_frames)
        return {
            **self._sessions.handlers(control, self.quotas),
            "Forward": grpc.stream_stream_rpc_method_handler(self._forward),
            "Backward": grpc.stream_stream_rpc_method_handler(self._backward),
            "FinishStep": grpc.stream_stream_rpc_method_handler(self._finish_step),
        }

    def close(self) -> None:
        """Give the memory up that is shared with clients: their experiment has gone."""
        self._shared.close()

    def _forward(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        with ExitStack() as stack:
            coded = Coded(self._codecs.activations, "hidden_states")
            call = self._enter(stack, "Forward", requests, context, coded)
            result = self._engine.forward(_forward_call(call))
            return self._leave(call, result, Coded(self._codecs.activations, "trunk_output"))

    def _backward(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        with ExitStack() as stack:
            coded = Coded(self._codecs.gradients, "trunk_output_grad", without_zeros=True)
            waits = self._engine.window_batches
            call = self._enter(stack, "Backward", requests, context, coded, waits=waits)
            result = self._engine.backward(_backward_call(call))
            zeros = call.header.backward.without_zeros
            return self._leave(
                call, result, replace(coded, name="smashed_grad", without_zeros=zeros)
            )

    def _finish_step(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        with ExitStack() as stack:
            call = self._enter(stack, "FinishStep", requests, context)
            return self._leave(call, self._engine.finish_step(_finish_call(call)))

    def _enter(
        self,
        stack: ExitStack,
        method: str,
        requests: Iterator[bytes],
        context: Context,
        coded: Coded | None = None,
        *,
        waits: bool = True,
    ) -> _Entered:
        """Let a call in: its place, its first frame, whose it is, what it announces, its tensors.

        Args:
            stack: Ends what is entered for the call, its place and its status last.
            method: Its name.
            requests: Its frames.
            context: The call's gRPC context.
            coded: The one large tensor that it may bring; None: it brings plain ones.
            waits: Whether it may wait for other clients.

        Raises:
            FlowerSplitError: It is not let in, or is none of the kind.
        """
        answering = stack.enter_context(Answering(context, method, self._refusals))
        held = stack.enter_context(Holding(self.quotas, context, waits=waits))
        if coded is not None:
            stack.enter_context(self._aside())
        deadline = deadline_of(context, self._max_call_seconds)
        frames = self._first_frames.of(requests)
        incoming = Incoming(frames, _FIELDS[method], partial(self._shared.of, held.token))
        head = incoming.header
        said: _Said = head.finish_step
        if method != "FinishStep":
            said = head.forward if method == "Forward" else head.backward
        self._tokens.check(held.token, said.session, said.trunk_epoch, self._engine.epoch)
        held.announce(head.tensors)
        answering.header = said
        once = method == "Forward" and not (said.HasField("key") or head.forward.HasField("cache"))
        received = incoming.receive(
            self._max_tensor_bytes,
            coded=coded,
            allocate=pooled if coded is None else self._allocate,
            digest=not once,
            admit=partial(self.quotas.announce, held),
        )
        answering.digest = received.digest
        tensor = None if coded is None else received.tensors.get(coded.name)
        if (
            coded is not None
            and tensor is not None
            and self._on_gpu
            and tensor.device.type == "cpu"
        ):
            received.tensors[coded.name] = arrived(
                tensor, self._device
            )  # checked and computed there
        return _Entered(head, said.session, received, deadline, incoming.shared)

    def _leave(
        self, call: _Entered, result: CallResult | FinishResult, coded: Coded | None = None
    ) -> Iterator[bytes]:
        """Return the frames of a call's reply, once its bytes are counted.

        Args:
            call: The call that is answered; the reply goes the way that it came.
            result: The engine's result.
            coded: How the result's one tensor travels; None: it has plain ones.
        """
        if self._tracing is not None:
            self._tracing.shares(result.queue_seconds, result.compute_seconds)
        head = pb.ReplyHeader(
            version=result.version,
            compute_seconds=result.compute_seconds,
            queue_seconds=result.queue_seconds,
        )
        stays = False
        if isinstance(result, FinishResult):
            head.clip_factor, head.grad_norm = result.clip_factor, result.grad_norm
            tensors = result.gradients
        else:
            assert coded is not None, "a result with one tensor goes through a codec"
            stays = call.header.HasField("device") and stays_on_device(coded.codec)
            whole = to_host(result.tensor) if self._on_gpu and not stays else result.tensor
            tensors = coded.encode(whole)
        reply = Outgoing(pb.Header(reply=head), tensors, tensors if stays else ())
        self._engine.count_bytes(call.session, call.received.num_bytes, reply.num_bytes)
        return reply.frames() if call.shared is None else placed_frames(call.shared, reply)


def _mode_of(header: pb.ForwardHeader) -> ForwardMode:
    """Return the forward's mode; a recorded one must carry a key.

    Raises:
        CodecError: The mode is unknown, or the key is missing.
    """
    try:
        mode = ForwardMode(header.mode)
    except ValueError:
        raise CodecError(f"the forward has the unknown mode number {header.mode}.") from None
    if mode is not ForwardMode.EVALUATE and not header.HasField("key"):
        raise CodecError(f"a forward in mode {mode.name} must carry a contribution key.")
    return mode


def _forward_call(call: _Entered) -> ForwardCall:
    """Return the forward.

    Raises:
        CodecError: Its mode is unknown, or it is recorded and has no key.
    """
    header, tensors = call.header.forward, call.received.tensors
    rows = tensors.pop("cache_rows", None) if header.HasField("cache") else None
    mask = tensors.get("attention_mask")
    if mask is not None and mask.dtype == torch.bool and mask.ndim == 2:
        tensors["attention_mask"] = mask.to(torch.int64)  # as tokenizers give it
    return ForwardCall(
        session=header.session,
        epoch=header.trunk_epoch,
        key=_key_of(header.key) if header.HasField("key") else None,
        version=header.version,
        mode=_mode_of(header),
        tensors=tensors,
        digest=call.received.digest,
        deadline=call.deadline,
        acknowledged=header.acknowledged,
        last=header.last,
        use_cache=header.use_cache if header.HasField("use_cache") else None,
        cache=cache_from_proto(header.cache, rows) if header.HasField("cache") else None,
        released=tuple(header.released_caches),
    )


def _backward_call(call: _Entered) -> BackwardCall:
    """Return the backward; its digest covers the counts, which travel in the header.

    Raises:
        CodecError: It has no gradient, or a count is negative or not finite.
    """
    header, grad = call.header.backward, call.received.tensors.get("trunk_output_grad")
    if grad is None:
        raise CodecError("a backward must carry the tensor 'trunk_output_grad'.")
    for name, value in (
        ("num_tokens", header.num_tokens),
        ("loss_denominator", header.loss_denominator),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise CodecError(f"{name} must be finite and not negative; it is {value}.")
    counts = struct.pack("<dd?", header.num_tokens, header.loss_denominator, header.last)
    return BackwardCall(
        session=header.session,
        epoch=header.trunk_epoch,
        key=_key_of(header.key),
        version=header.version,
        grad=grad,
        num_tokens=header.num_tokens,
        loss_denominator=header.loss_denominator,
        last=header.last,
        digest=xxhash.xxh3_128_digest(call.received.digest + counts),
        deadline=call.deadline,
    )


def _finish_call(call: _Entered) -> FinishCall:
    """Return the end of a step; its digest covers the norm, which travels in the header.

    Raises:
        CodecError: It has no key.
    """
    header = call.header.finish_step
    if not header.HasField("key"):
        raise CodecError("FinishStep must carry a contribution key.")
    norm = struct.pack("<d", header.grad_norm_squared)
    return FinishCall(
        session=header.session,
        epoch=header.trunk_epoch,
        key=_key_of(header.key),
        grad_norm_squared=header.grad_norm_squared,
        gradients=call.received.tensors,
        digest=xxhash.xxh3_128_digest(call.received.digest + norm),
        deadline=call.deadline,
    )


def _key_of(key: pb.ContributionKey) -> ContributionKey:
    return ContributionKey(
        experiment=key.experiment,
        server_round=key.server_round,
        attempt=key.attempt,
        window=key.window,
        micro_batch=key.micro_batch,
    )
