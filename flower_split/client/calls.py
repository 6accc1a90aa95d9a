"""The calls of one session, and of one micro-batch: their names, their headers, what they cost.

Shapes: smashed data, ``trunk_output`` and their gradients ``[batch, seq, hidden]``.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from flower_split.errors import CodecError, TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cache_to_proto
from flower_split.protocol.values import ForwardMode, SessionGrant
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.wire.codecs import Codec, Coded, TensorForm
from flower_split.wire.receiving import Incoming, Received
from flower_split.wire.sending import Outgoing
from flower_split.wire.staging import Allocate, pooled
from flower_split.wire.transport import Transport


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


class CurrentMicroBatch:
    """The micro-batch that each thread is inside of."""

    def __init__(self) -> None:
        self._current = threading.local()  # .value: MicroBatch or None

    @contextmanager
    def inside(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Be inside ``micro_batch``, on this thread.

        Raises:
            TrunkError: The thread is inside another one.
        """
        outer: MicroBatch | None = getattr(self._current, "value", None)
        if outer is not None:
            raise TrunkError(
                f"micro_batch(window={micro_batch.window}, index={micro_batch.index}) stands inside "
                f"{outer}; end that block first."
            )
        self._current.value = micro_batch
        try:
            yield
        finally:
            self._current.value = None

    def take(self) -> MicroBatch:
        """Return the micro-batch for the one forward that it names.

        Raises:
            TrunkError: The thread is inside none, or it has made its forward.
        """
        micro_batch: MicroBatch | None = getattr(self._current, "value", None)
        if micro_batch is None:
            raise TrunkError(
                "a training forward through the remote trunk must be made inside "
                "RemoteTrunk.micro_batch(...), on the same thread; or turn autograd off "
                "(torch.no_grad()) to evaluate."
            )
        if micro_batch.used:
            raise TrunkError(
                f"{micro_batch} has made its forward; each needs a block of its own (and gradient "
                "checkpointing must not wrap the trunk)."
            )
        micro_batch.used = True
        return micro_batch


@dataclass(frozen=True, slots=True)
class WireStats:
    """Totals over the calls of a session; retries count once.

    Bytes are those of frames; gradients are those of backwards and ends of steps.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    wire_seconds: float = 0.0  # from a call's start to its end, less the trunk's two shares below
    trunk_compute_seconds: float = 0.0  # as the trunk reports it
    trunk_queue_seconds: float = 0.0  # at the trunk: for its processor, and for the other clients
    calls: int = 0  # forwards, backwards and ends of steps
    gradient_bytes_sent: int = 0  # of bytes_sent
    gradient_bytes_received: int = 0  # of bytes_received


class SessionCalls:
    """Makes the calls of a session, and counts them. Thread-safe.

    Args:
        channel: The connections.
        codec: How activations and gradients travel.

    Attributes:
        channel: As given.
        codec: As given.
        grant: Of the open session; None: it is not open.
        max_tensor_bytes: That one call may carry.
        waiting: Entered around every call.
    """

    def __init__(self, channel: Transport, codec: Codec) -> None:
        self.channel = channel
        self.codec = codec
        self.grant: SessionGrant | None = None
        self.max_tensor_bytes = 0
        self.waiting: Callable[[], AbstractContextManager[object]] = nullcontext
        self._stats = WireStats()
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
        reply: Coded | None = None,
        reply_bytes: int | None = None,
        allocate: Allocate = pooled,
    ) -> tuple[Received, pb.ReplyHeader]:
        """Make one call that sends tensors and gets tensors back.

        Args:
            method: Which.
            header: Of the call.
            tensors: To send.
            reply: The tensor that comes back through the codec; None: the others alone.
            reply_bytes: Limit on what comes back; None: that of a call.
            allocate: Where it is received.

        Raises:
            CodecError: It is too large for this trunk, or the answer is not what was asked for.
            TrunkUnavailable: No answer within the call timeout.
            TrunkRefused: The trunk answered no.
            RoundAborted: The round was given up.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.max_tensor_bytes:
            raise CodecError(
                f"one call may carry {self.max_tensor_bytes} bytes of tensors to this trunk; this "
                f"{method} has {size}. Lower train.batch-size or train.sequence-length."
            )
        limit = self.max_tensor_bytes if reply_bytes is None else reply_bytes
        message = Outgoing(header, tensors)
        started = time.monotonic()

        def read(frames: Iterator[bytes]) -> tuple[Received, pb.ReplyHeader]:
            incoming = Incoming(frames, "reply")
            return incoming.receive(limit, coded=reply, allocate=allocate), incoming.header.reply

        with self.waiting():
            received, answer = self.channel.stream(method, message, read)
        seconds = time.monotonic() - started
        self._count(method, message.num_bytes, received.num_bytes, seconds, answer)
        return received, answer

    @property
    def stats(self) -> WireStats:
        """Totals since the beginning, or since the last :meth:`take_stats`."""
        with self._lock:
            return self._stats

    def take_stats(self) -> WireStats:
        """Return the totals, which begin anew."""
        with self._lock:
            taken, self._stats = self._stats, WireStats()
            return taken

    def answered_below(self, window: int) -> int:
        """Return the first micro-batch of ``window`` that still waits for a reply."""
        with self._lock:
            answered = self._answered.get(window, set())
            return next(index for index in itertools.count() if index not in answered)

    def note_answered(self, window: int, index: int) -> None:
        """Note that the backward of a micro-batch has its reply."""
        with self._lock:
            self._answered = {window: self._answered.get(window, set()) | {index}}

    def _count(
        self, method: str, sent: int, received: int, seconds: float, reply: pb.ReplyHeader
    ) -> None:
        backward = method in ("Backward", "FinishStep")  # what carries gradients
        elsewhere = reply.compute_seconds + reply.queue_seconds
        with self._lock:
            total = self._stats
            self._stats = replace(
                total,
                bytes_sent=total.bytes_sent + sent,
                bytes_received=total.bytes_received + received,
                wire_seconds=total.wire_seconds + max(0.0, seconds - elsewhere),
                trunk_compute_seconds=total.trunk_compute_seconds + reply.compute_seconds,
                trunk_queue_seconds=total.trunk_queue_seconds + reply.queue_seconds,
                calls=total.calls + 1,
                gradient_bytes_sent=total.gradient_bytes_sent + sent * backward,
                gradient_bytes_received=total.gradient_bytes_received + received * backward,
            )


@dataclass(frozen=True, slots=True)
class Caching:
    """What one forward says about key-value caches."""

    use_cache: bool | None
    step: CacheStep | None
    released: list[int]


class Exchange:
    """The calls of one micro-batch: a forward, then at most one backward.

    Args:
        calls: Of the open session.
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
        self._mode = mode
        self._micro_batch = micro_batch
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
        if self._caching.use_cache is not None:
            header.use_cache = self._caching.use_cache
        if self._caching.step is not None:
            header.cache.CopyFrom(cache_to_proto(self._caching.step))
            header.released_caches.extend(self._caching.released)
        output, self._version = self._call(
            "Forward", pb.Header(forward=header), ("hidden_states", smashed), "trunk_output"
        )
        return output

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        """Send the output's gradient; return ``smashed_grad``. Once.

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
        )
        smashed_grad, _ = self._call(
            "Backward",
            pb.Header(backward=header),
            ("trunk_output_grad", trunk_output_grad),
            "smashed_grad",
        )
        self._calls.note_answered(micro_batch.window, micro_batch.index)
        return smashed_grad

    def _call(
        self, method: str, header: pb.Header, sent: tuple[str, Tensor], result: str
    ) -> tuple[Tensor, int]:
        """Make a call; return the tensor ``result``, in the form of what is sent, and its version."""
        codec, (name, tensor) = self._calls.codec, sent
        received, reply = self._calls.exchange(
            method,
            header,
            {**Coded(codec, name).encode(tensor), **self._extras},
            reply=Coded(codec, result, TensorForm.of(tensor)),
            allocate=self._allocate,
        )
        self._extras = {}
        return received.tensors[result], reply.version

    def _key(self, micro_batch: MicroBatch) -> pb.ContributionKey:
        return pb.ContributionKey(
            experiment=self._grant.experiment,
            server_round=self._grant.server_round,
            attempt=self._grant.attempt,
            window=micro_batch.window,
            micro_batch=micro_batch.index,
        )
