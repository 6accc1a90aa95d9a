"""Around every call to the trunk: its deadline, its tokens, its quotas, and its status."""

import hmac
import logging
import math
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from flower_split.errors import CodecError, FlowerSplitError, RefusalReason, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.audit_log import Told, event_of
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.grpc_status import REFUSAL_KEY, TrunkBusy, status_of

logger = logging.getLogger(__name__)

_MAX_SESSIONS = 4096  # whose tokens are remembered; those of the latest rounds
_ANSWER_SECONDS = 0.25  # kept back from a deadline, so that the reason still reaches the client

Request = TypeVar("Request", bound=Message)
Context = grpc.ServicerContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the calls of one session may take at once; the trunk's own configuration says it."""

    calls: int = 32  # trunk.max-calls-in-flight
    call_bytes: int = 1 << 30  # trunk.call-memory-per-client: of their tensors, as announced
    call_positions: int = 1 << 18  # trunk.max-call-positions: rows x positions of each


class Quotas:
    """What the calls in progress take: permits to wait, and each session's share.

    A client that wants more than its share is refused by the key of the limit; it never costs another
    client anything. Thread-safe: a lock of its own, under which nothing else is locked.

    Args:
        waiting: Calls that may wait for others at once, of all sessions.
        limits: Of one session.
    """

    def __init__(self, waiting: int, limits: Limits) -> None:
        self.limits = limits
        self._waiting = waiting
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._calls: Counter[str] = Counter()  # by token
        self._bytes: Counter[str] = Counter()

    def enter(self, token: str, waits: bool) -> None:
        """Count a call in.

        Raises:
            TrunkRefused: Its session makes too many at once (OVER_BUDGET).
            TrunkBusy: Too many calls wait.
        """
        with self._lock:
            if self._calls[token] >= self.limits.calls:
                raise TrunkRefused(
                    RefusalReason.OVER_BUDGET,
                    f"a client may have {self.limits.calls} calls in progress "
                    "(trunk.max-calls-in-flight); this one has as many. Lower "
                    "train.micro-batches-in-flight, or raise the key at the trunk.",
                )
            if waits and self._num_waiting >= self._waiting:
                raise TrunkBusy(
                    f"the trunk already has {self._waiting} waiting calls; the client will retry "
                    "this one."
                )
            self._calls[token] += 1
            self._num_waiting += waits

    def announce(self, token: str, num_bytes: int) -> None:
        """Count the bytes of a call's tensors in, before anything is allocated for them.

        Raises:
            TrunkRefused: Its session holds too many (OVER_BUDGET).
        """
        with self._lock:
            held, limit = self._bytes[token], self.limits.call_bytes
            if held + num_bytes > limit:
                raise TrunkRefused(
                    RefusalReason.OVER_BUDGET,
                    f"the calls in progress of a client may hold {limit} bytes of tensors "
                    f"(trunk.call-memory-per-client); this one's hold {held}, and its next call has "
                    f"{num_bytes}. Lower train.batch-size or train.micro-batches-in-flight.",
                )
            self._bytes[token] = held + num_bytes

    def leave(self, token: str, waits: bool, num_bytes: int) -> None:
        """Count a call out, with what it announced."""
        with self._lock:
            self._num_waiting -= waits
            self._calls[token] -= 1
            self._bytes[token] -= num_bytes
            if not self._calls[token]:
                del self._calls[token], self._bytes[token]


class Holding(AbstractContextManager["Holding"]):
    """One call's part of the quotas, inside its block.

    Args:
        quotas: Of the trunk.
        context: Of the call.
        waits: Whether it may wait for other clients.
    """

    def __init__(self, quotas: Quotas, context: Context, *, waits: bool) -> None:
        self._quotas = quotas
        self._waits = waits
        self._num_bytes = 0
        self.token = token_of(context)

    def __enter__(self) -> "Holding":
        """Count the call in."""
        self._quotas.enter(self.token, self._waits)
        return self

    def __exit__(self, *exception: object) -> None:
        """Count it out."""
        self._quotas.leave(self.token, self._waits, self._num_bytes)

    def announce(self, tensors: Iterable[pb.TensorSpec]) -> None:
        """Look at what the call's header announces.

        Raises:
            TrunkRefused: It is more than a call, or its session, may have (OVER_BUDGET).
        """
        total, limit = 0, self._quotas.limits.call_positions
        for spec in tensors:
            shape = spec.shape
            if len(shape) == 3 and shape[0] * shape[1] > limit:
                raise TrunkRefused(
                    RefusalReason.OVER_BUDGET,
                    f"a call may have {limit} rows x positions (trunk.max-call-positions); this one "
                    f"has {shape[0]} x {shape[1]}. Send smaller batches, or raise the key at the trunk.",
                )
            total += spec.num_bytes
        self._quotas.announce(self.token, total)
        self._num_bytes = total


class Answering(AbstractContextManager["Answering"]):
    """Turns what is raised inside its block into the call's status, here and nowhere else.

    Args:
        context: Of the call.
        method: Its name, for the log.
        refusals: Notes refused calls.

    Attributes:
        header: What the call says of itself, once it has been read; for the audit log.
        digest: Of what arrived.
    """

    def __init__(self, context: Context, method: str, refusals: RefusalLog) -> None:
        self.header: Message | None = None
        self.digest = b""
        self._context = context
        self._method = method
        self._refusals = refusals

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the call with the status of ``error``, if there is one."""
        if self._refusals.audit is not None:
            token = bearer_in(self._context.invocation_metadata())
            told = Told(self._context.peer(), token, self._method, self.header, self.digest)
            self._refusals.audit.note(event_of(told, error))
        if isinstance(error, FlowerSplitError):
            code, text, refusal = status_of(error)
            if refusal is not None:
                self._context.set_trailing_metadata(((REFUSAL_KEY, refusal.SerializeToString()),))
            logger.debug("%s: %s, %s", self._method, code.name, text)
            self._refusals.note(self._context.peer(), self._method, error)
            _abort(self._context, code, text)
        elif isinstance(error, Exception) and not isinstance(error, grpc.RpcError):
            # (An RpcError: the client has gone; nobody is there to be told.)
            incident = secrets.token_hex(4)
            logger.error("%s failed, incident %s", self._method, incident, exc_info=error)
            text = (
                f"the trunk failed at {self._method}; its log says why under incident {incident}."
            )
            _abort(self._context, grpc.StatusCode.INTERNAL, text)


def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("grpc's abort raises")


def parsed(request_type: type[Request], data: bytes) -> Request:
    """Return the request of a control call.

    Raises:
        CodecError: The bytes are not that message.
    """
    try:
        return request_type.FromString(data)
    except (DecodeError, ValueError) as error:  # by the version of protobuf, one is the other
        raise CodecError("the request is not a valid protobuf message.") from error


def unary(
    request_type: type[Request],
    behaviour: Callable[[Request, Context], Message],
    refusals: RefusalLog,
    admit: Callable[[Context], None] = lambda context: None,
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """Return the handler of a control call: its bytes parsed, its reply's serialised.

    Args:
        request_type: Of the call.
        behaviour: Answers it.
        refusals: Notes it where it is refused.
        admit: Raises for a caller who may not make it, before anything of the request is read.
    """
    name = request_type.DESCRIPTOR.name.removesuffix("Request")

    def handle(data: bytes, context: Context) -> bytes:
        with Answering(context, name, refusals) as call:
            admit(context)
            call.header = request = parsed(request_type, data)
            return behaviour(request, context).SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)


def bearer_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """Return the bearer token among a call's metadata; None: it carries none."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
            return value.removeprefix("Bearer ")
    return None


def token_of(context: Context) -> str:
    """Return the bearer token of a call.

    Raises:
        TrunkRefused: It has none.
    """
    token = bearer_in(context.invocation_metadata())
    if token is not None:
        return token
    raise TrunkRefused(
        RefusalReason.UNAUTHENTICATED,
        'a call must carry the metadata "authorization: Bearer <token>".',
    )


def deadline_of(context: Context, at_most: float = math.inf) -> float:
    """Return the call's deadline on the monotonic clock, early enough that the answer arrives.

    Args:
        context: Of the call.
        at_most: Seconds that the trunk lets it wait, whatever its caller asks for.

    Raises:
        CodecError: The call has none.
    """
    remaining = context.time_remaining()
    if remaining is None or remaining > 86_400:
        raise CodecError("every call to the trunk must have a deadline of at most a day.")
    remaining = min(remaining, at_most)
    return time.monotonic() + remaining - min(_ANSWER_SECONDS, 0.2 * remaining)


class SessionTokens:
    """The tokens of the latest sessions. Thread-safe: a lock of its own, taken last."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, str] = OrderedDict()  # by session, oldest first
        self._lock = threading.Lock()

    def remember(self, session: str, token: str) -> None:
        """Note that ``token`` opened ``session``."""
        with self._lock:
            self._tokens[session] = token
            self._tokens.move_to_end(session)
            while len(self._tokens) > _MAX_SESSIONS:
                self._tokens.popitem(last=False)

    def check(self, token: str, session: str, epoch: int, trunk_epoch: int) -> None:
        """Refuse a call whose session was not opened in this process with the call's own token.

        Args:
            token: Of the call.
            session: That it names.
            epoch: That it names.
            trunk_epoch: Of this process.

        Raises:
            TrunkRefused: WRONG_EPOCH, UNKNOWN_SESSION or UNAUTHENTICATED.
        """
        if epoch != trunk_epoch:
            raise TrunkRefused(
                RefusalReason.WRONG_EPOCH,
                "the trunk has restarted since this session opened; what the session had "
                "contributed is gone. Leave this round; the next one opens a new session.",
            )
        with self._lock:
            expected = self._tokens.get(session)
        if expected is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_SESSION,
                "the trunk knows no such session: it was never opened, or belongs to a round long "
                "past. Open a session for every round.",
            )
        if not same_token(token, expected):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                "the token of this call is not the one that opened its session.",
            )


def same_token(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())
