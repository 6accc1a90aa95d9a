"""One client's session with a served trunk: joining, calls, and what they cost.

:class:`flower_split.client.remote_trunk.RemoteTrunk` is a module around it. Thread-safe.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from flower_split.errors import CodecError, TrunkError
from flower_split.parties.fingerprint import CODEC
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import cuts_to_proto, grant_from_proto
from flower_split.protocol.values import SessionGrant
from flower_split.split import CutLayers
from flower_split.wire.codecs import NATIVE, TensorForm, make_codec
from flower_split.wire.codecs.coding import encode, receive
from flower_split.wire.frames import Incoming, Outgoing, Received
from flower_split.wire.staging import Allocate
from flower_split.wire.transport import Transport

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 2.0  # a trunk that has gone must not hold up a client that is done


@dataclass(frozen=True, slots=True)
class WireStats:
    """Totals over the calls of a session; retries count once.

    Args:
        bytes_sent: In frames.
        bytes_received: In frames.
        wire_seconds: From a call's start to its end, less the trunk's two shares below.
        trunk_compute_seconds: As the trunk reports it.
        trunk_queue_seconds: Waiting at the trunk: for its processor, and for the other clients.
        calls: Forwards, backwards and ends of steps.
        gradient_bytes_sent: Of ``bytes_sent``, in backwards and ends of steps.
        gradient_bytes_received: Of ``bytes_received``, in backwards and ends of steps.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    wire_seconds: float = 0.0
    trunk_compute_seconds: float = 0.0
    trunk_queue_seconds: float = 0.0
    calls: int = 0
    gradient_bytes_sent: int = 0
    gradient_bytes_received: int = 0


class TrunkSession:
    """A session, from :meth:`open` to :meth:`close`.

    Args:
        channel: The connections, with this client's token of the round.
        fingerprint: Of the model and configuration; names the codec.
        cuts: Where the client's model is cut; None: where the fingerprint says.
        call_timeout: Seconds per call, retries and the wait for other clients included.

    Attributes:
        waiting: Entered around every call.
        evaluate: Whether the session only evaluates.
        codec: How activations and gradients travel.

    Raises:
        ConfigError: There is no such codec.
    """

    def __init__(
        self,
        channel: Transport,
        fingerprint: Mapping[str, str],
        cuts: CutLayers | None,
        call_timeout: float,
    ) -> None:
        self.waiting: Callable[[], AbstractContextManager[object]] = nullcontext
        self.evaluate = False
        self.channel = channel
        self.grant: SessionGrant | None = None
        self.max_tensor_bytes = 0
        self.codec = make_codec(fingerprint.get(CODEC, NATIVE))
        self._fingerprint = dict(fingerprint)
        self._cuts = cuts
        self._call_timeout = call_timeout
        self._stats = WireStats()
        self._lock = threading.Lock()
        self._answered: dict[int, set[int]] = {}  # window -> micro-batches whose backward is done

    def open(self, planned_steps: int, *, evaluate: bool = False) -> SessionGrant:
        """See :meth:`flower_split.client.remote_trunk.RemoteTrunk.open`."""
        if self.grant is not None:
            raise TrunkError("this RemoteTrunk has a session already; make a new one per round.")
        request = pb.OpenSessionRequest(
            fingerprint=self._fingerprint,
            planned_steps=planned_steps,
            evaluate=evaluate,
            cuts=cuts_to_proto(self._cuts),
        )
        with self.waiting():
            reply = self.channel.unary("OpenSession", request, pb.OpenSessionReply)
        self.evaluate = evaluate
        self.max_tensor_bytes = reply.max_tensor_bytes
        self.grant = grant_from_proto(reply)
        logger.debug(
            "session open: slot=%d round=%d version=%d",
            reply.slot,
            reply.server_round,
            reply.version,
        )
        return self.grant

    def close(self) -> None:
        """Leave the round and close the connections. Idempotent; raises nothing of the trunk's."""
        grant, self.grant = self.grant, None
        if grant is not None:
            request = pb.CloseSessionRequest(session=grant.session, trunk_epoch=grant.epoch)
            try:
                self.channel.unary(
                    "CloseSession",
                    request,
                    pb.CloseSessionReply,
                    timeout=min(self._call_timeout, _CLOSE_SECONDS),
                )
            except TrunkError as error:
                logger.debug("the session ends without the trunk's answer: %s", error)
        self.channel.close()

    def wait_version(self, version: int) -> int:
        """See :meth:`flower_split.client.remote_trunk.RemoteTrunk.wait_version`."""
        grant = self.require()
        request = pb.WaitVersionRequest(
            session=grant.session, trunk_epoch=grant.epoch, version=version
        )
        with self.waiting():
            return self.channel.unary("WaitVersion", request, pb.WaitVersionReply).version

    def require(self) -> SessionGrant:
        """Return the open session.

        Raises:
            TrunkError: There is none.
        """
        if self.grant is None:
            raise TrunkError("the remote trunk has no open session; call RemoteTrunk.open() first.")
        return self.grant

    def call(
        self,
        method: str,
        header: pb.Header,
        sent: tuple[str, Tensor],
        extras: Mapping[str, Tensor],
        result: str,
        allocate: Allocate,
    ) -> tuple[Tensor, int]:
        """Make one Forward or Backward.

        Args:
            method: Which.
            header: Of the call.
            sent: The name of the tensor that passes through the codec, and itself.
            extras: What goes with it, as it is.
            result: The name of the tensor that comes back, in the form of what is sent.
            allocate: Where it is received.

        Returns:
            The tensor, and the version of the weights that made it.

        Raises:
            CodecError: It is too large for this trunk, or the answer is not what was asked for.
            TrunkUnavailable: No answer within the call timeout.
            TrunkRefused: The trunk answered no.
            RoundAborted: The round was given up.
        """
        like = TensorForm.of(sent[1])
        tensors = {**encode(self.codec, *sent), **extras}

        def read(incoming: Incoming) -> Received:
            return receive(
                incoming, self.codec, result, self.max_tensor_bytes, allocate=allocate, like=like
            )

        received, reply = self.exchange(method, header, tensors, read)
        return received.tensors[result], reply.version

    def exchange(
        self,
        method: str,
        header: pb.Header,
        tensors: Mapping[str, Tensor],
        receive_reply: Callable[[Incoming], Received],
    ) -> tuple[Received, pb.ReplyHeader]:
        """Make one call that sends tensors and gets tensors back.

        Args:
            method: Which.
            header: Of the call.
            tensors: To send.
            receive_reply: Checks and receives the reply's tensors.

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
        message = Outgoing(header, tensors)
        started = time.monotonic()

        def read(frames: Iterator[bytes]) -> tuple[Received, pb.ReplyHeader]:
            incoming = Incoming(frames)
            return receive_reply(incoming), incoming.header.reply

        with self.waiting():
            received, reply = self.channel.stream(method, message, read)
        seconds = time.monotonic() - started
        self._count(method, message.num_bytes, received.num_bytes, seconds, reply)
        return received, reply

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
