"""The calls of one session, and of one micro-batch: their headers, what they cost, autograd's part.

Smashed data, ``trunk_output`` and their gradients are ``[batch, seq, hidden]``. The autograd function
lives on the CPU, with the copies to and from a GPU around it: then autograd runs it on the thread that
called ``backward``, not on the device's one backward thread, and micro-batches in flight do not wait
for each other's calls.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flower_split.client.passing import Passing, TwoCalls
from flower_split.errors import CodecError, TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cache_to_proto
from flower_split.protocol.values import ForwardMode, SessionGrant
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.training.trunk_protocol import CallStats
from flower_split.wire.codecs import Coded, TensorForm, WireCodecs
from flower_split.wire.receiving import Received, received
from flower_split.wire.sending import Outgoing
from flower_split.wire.staging import Allocate, ToDevice, ToHost, pooled
from flower_split.wire.transport import DeviceTransport, Transport


@dataclass(slots=True)
class MicroBatch:
    """What is said of the one forward made inside a ``micro_batch`` block."""

    window: int  # the optimizer step within the round, from 0; 0 where a window is a round
    index: int  # within the window, from 0
    num_tokens: int  # label tokens
    loss_denominator: float  # what its summed token loss is divided by
    last: bool  # whether the window gets no further micro-batch from this client
    used: bool = False  # whether it has made its forward

    def __str__(self) -> str:
        return f"micro-batch {self.index} of window {self.window}"


class SessionCalls:
    """Makes the calls of a session, and counts them. Thread-safe.

    Attributes:
        channel: The connections.
        codecs: How activations and gradients travel.
        grant: The open session's grant; None: it is not open.
        max_tensor_bytes: Most that one call may carry.
        without_zeros: Whether gradients may travel without their rows of zeros.
        waiting: Entered around every call.
    """

    def __init__(self, channel: Transport, codecs: WireCodecs) -> None:
        self.channel = channel
        self.codecs = codecs
        self.grant: SessionGrant | None = None
        self.max_tensor_bytes = 0
        self.without_zeros = False
        self.waiting: Callable[[], AbstractContextManager[object]] = nullcontext
        self._stats = CallStats()
        self._lock = threading.Lock()
        self._answered: dict[int, set[int]] = {}  # window -> micro-batches whose backward is done

    def require(self) -> SessionGrant:
        """Return the open session.

        Raises:
            TrunkError: There is none.
        """
        if self.grant is None:
            raise TrunkError("the remote trunk has no open session; call RemoteTrunk.open() first.")
        return self.grant

    def exchange(
        self,
        method: str,
        header: pb.Header,
        tensors: Mapping[str, Tensor],
        *,
        sent: tuple[Coded, Tensor] | None = None,
        result: str = "",
        answers: MicroBatch | None = None,
        reply_bytes: int | None = None,
        allocate: Allocate = pooled,
    ) -> tuple[Received, pb.ReplyHeader]:
        """Make one call that sends tensors and gets tensors back.

        Args:
            method: Which.
            header: The call's header.
            tensors: To send, as they are.
            sent: The tensor that goes through a codec; None: there is none.
            result: The name of the one that comes back through it, in the form of ``sent``.
            answers: The micro-batch that is done with the reply; None: none is.
            reply_bytes: Limit on what comes back; None: that of a call.
            allocate: Where it is received.

        Raises:
            CodecError: It is too large, or the answer is not what was asked for.
            TrunkError: As :class:`~flower_split.wire.transport.Transport` says.
        """
        message, coded = self._message(method, header, tensors, sent, result)
        limit = self.max_tensor_bytes if reply_bytes is None else reply_bytes
        read = partial(received, call="reply", max_bytes=limit, coded=coded, allocate=allocate)
        started = time.monotonic()
        with self.waiting():
            arrived, answered = self.channel.stream(method, message, read)
        seconds, reply = time.monotonic() - started, answered.reply
        elsewhere = reply.compute_seconds + reply.queue_seconds
        backward = method in ("Backward", "FinishStep")  # what carries gradients
        with self._lock:
            total = self._stats
            self._stats = replace(
                total,
                bytes_sent=total.bytes_sent + message.num_bytes,
                bytes_received=total.bytes_received + arrived.num_bytes,
                wire_seconds=total.wire_seconds + max(0.0, seconds - elsewhere),
                trunk_compute_seconds=total.trunk_compute_seconds + reply.compute_seconds,
                trunk_queue_seconds=total.trunk_queue_seconds + reply.queue_seconds,
                calls=total.calls + 1,
                gradient_bytes_sent=total.gradient_bytes_sent + message.num_bytes * backward,
                gradient_bytes_received=total.gradient_bytes_received
                + arrived.num_bytes * backward,
            )
            if answers is not None:
                done = self._answered.get(answers.window, set())
                self._answered = {answers.window: done | {answers.index}}
        return arrived, reply

    def _message(
        self,
        method: str,
        header: pb.Header,
        tensors: Mapping[str, Tensor],
        sent: tuple[Coded, Tensor] | None,
        result: str,
    ) -> tuple[Outgoing, Coded | None]:
        """Return a call's message, and how its result comes back; see :meth:`exchange`.

        Raises:
            CodecError: It is too large.
        """
        reply, staying = None, frozenset[str]()
        if sent is not None:
            coded, tensor = sent
            reply = replace(coded, name=result, like=TensorForm.of(tensor))
            parts = coded.encode(tensor)
            staying = frozenset(parts if tensor.device.type != "cpu" else ())
            tensors = {**parts, **tensors}
        message = Outgoing(header, tensors, staying)
        if message.tensor_bytes > self.max_tensor_bytes:
            raise CodecError(
                f"one call may carry {self.max_tensor_bytes} bytes of tensors to this trunk; this "
                f"{method} has {message.tensor_bytes}. Lower train.batch-size or "
                "train.sequence-length."
            )
        return message, reply

    @property
    def stats(self) -> CallStats:
        """Totals since the beginning, or since the last :meth:`take_stats`."""
        with self._lock:
            return self._stats

    def take_stats(self) -> CallStats:
        """Return the totals, which begin anew."""
        with self._lock:
            taken, self._stats = self._stats, CallStats()
            return taken

    def answered_below(self, window: int) -> int:
        """Return the first micro-batch of ``window`` that still waits for a reply."""
        with self._lock:
            answered = self._answered.get(window, set())
            return next(index for index in itertools.count() if index not in answered)


@dataclass(frozen=True, slots=True)
class Caching:
    """What one forward says about key-value caches."""

    use_cache: bool | None
    step: CacheStep | None
    released: list[int]


class Exchange:
    """The calls of one micro-batch: a forward, then at most one backward.

    Args:
        calls: The session's calls.
        mode: What the trunk keeps.
        micro_batch: Which it is; None: an evaluation.
        extras: Tensors beside the hidden states.
        allocate: Where replies are received.
        caching: What the forward says about key-value caches.

    Raises:
        TrunkError: There is no open session.
    """

    def __init__(
        self,
        calls: SessionCalls,
        mode: ForwardMode,
        micro_batch: MicroBatch | None,
        extras: Mapping[str, Tensor],
        allocate: Allocate,
        caching: Caching,
    ) -> None:
        self._calls = calls
        self._caching = caching
        self._grant = grant = calls.require()
        self._mode, self._micro_batch = mode, micro_batch
        self._extras = extras
        self._allocate = allocate
        self._version = grant.version + (micro_batch.window if micro_batch else 0)
        self._done = False

    def forward(self, smashed: Tensor) -> Tensor:
        """Send the smashed data [batch, seq, hidden]; return ``trunk_output`` of the same shape."""
        header = pb.ForwardHeader(
            session=self._grant.session,
            trunk_epoch=self._grant.epoch,
            version=self._version,
            mode=self._mode.name,
        )
        if self._micro_batch is not None:
            header.key.CopyFrom(self._key(self._micro_batch))
            header.acknowledged = self._calls.answered_below(self._micro_batch.window)
            header.last = self._micro_batch.last
        if self._caching.use_cache is not None:
            header.use_cache = self._caching.use_cache
        if self._caching.step is not None:
            header.cache.CopyFrom(cache_to_proto(self._caching.step))
            header.released_caches.extend(self._caching.released)
        arrived, reply = self._calls.exchange(
            "Forward",
            pb.Header(forward=header),
            self._extras,
            sent=(Coded(self._calls.codecs.activations, "hidden_states"), smashed),
            result="trunk_output",
            allocate=self._allocate,
        )
        self._extras, self._version = {}, reply.version
        return arrived.tensors["trunk_output"]

    def may_stay(self, smashed: Tensor) -> bool:
        """Return whether the trunk takes tensors of this GPU where they lie."""
        channel, staying = self._calls.channel, self._calls.codecs.stay_on_device
        return staying and isinstance(channel, DeviceTransport) and channel.takes(smashed)

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        """Send the output's gradient; return ``smashed_grad``, of the same dtype. Once.

        Raises:
            TrunkError: It has been called before.
        """
        micro_batch = self._micro_batch
        assert micro_batch is not None, "only training forwards are recorded by autograd"
        if self._done:
            raise TrunkError(
                f"{micro_batch} has had its backward; the trunk keeps its activations for one. Call "
                "backward() once, without retain_graph."
            )
        self._done = True
        header = pb.BackwardHeader(
            session=self._grant.session,
            trunk_epoch=self._grant.epoch,
            key=self._key(micro_batch),
            version=self._version,
            num_tokens=micro_batch.num_tokens,
            loss_denominator=micro_batch.loss_denominator,
            last=micro_batch.last,
            without_zeros=self._calls.without_zeros,
        )
        codec, dtype = self._calls.codecs.gradients, trunk_output_grad.dtype
        coded = Coded(codec, "trunk_output_grad", without_zeros=header.without_zeros)
        arrived, _ = self._calls.exchange(
            "Backward",
            pb.Header(backward=header),
            {},
            sent=(coded, trunk_output_grad.to(codec.dtype or dtype)),
            result="smashed_grad",
            answers=micro_batch,
            allocate=self._allocate,
        )
        return arrived.tensors["smashed_grad"].to(dtype)

    def _key(self, micro_batch: MicroBatch) -> pb.ContributionKey:
        return pb.ContributionKey(
            experiment=self._grant.experiment,
            server_round=self._grant.server_round,
            attempt=self._grant.attempt,
            window=micro_batch.window,
            micro_batch=micro_batch.index,
        )


def call_trunk(smashed: Tensor, always: Tensor, exchange: Exchange) -> Tensor:
    """Return ``trunk_output`` of ``smashed``, whose backward calls the trunk again.

    Args:
        smashed: In the dtype that travels, on any device.
        always: Requires grad, so that the backward is called even where ``smashed`` does not.
        exchange: The micro-batch's two calls.
    """
    device, on_gpu = smashed.device, smashed.device.type != "cpu"
    if on_gpu and exchange.may_stay(smashed):
        passed = Passing(exchange)
        stand_in = _CallTrunk.apply(passed.take_in(smashed), always, passed)  # type: ignore[no-untyped-call]
        return passed.give_out(stand_in)
    if on_gpu:
        smashed = ToHost.apply(smashed)  # type: ignore[no-untyped-call]
    output: Tensor = _CallTrunk.apply(smashed, always, exchange)  # type: ignore[no-untyped-call]
    if on_gpu:
        output = ToDevice.apply(output, device)  # type: ignore[no-untyped-call]
    return output


class _CallTrunk(torch.autograd.Function):
    """CPU tensors to the trunk and back, in both directions."""

    @staticmethod
    def forward(ctx: Any, smashed: Tensor, always: Tensor, exchange: TwoCalls) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(smashed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, trunk_output_grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.backward(trunk_output_grad), None, None
