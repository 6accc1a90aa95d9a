"""Around every call to the trunk: its time, its place among the others, and its status.

A client that wants more than its share is refused by the key of the limit. A call has its place until
its reply has left, and is cut off where it takes longer than the trunk allows.
"""

import hmac
import logging
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from flower_split.errors import CodecError, RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.proto import trunk_pb2 as pb
from flower_split.runtime.closing import Closing
from flower_split.trunk.service.audit_log import Told
from flower_split.trunk.service.client_certificates import common_name
from flower_split.trunk.service.limits import Limits
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.grpc_status import TrunkBusy

logger = logging.getLogger(__name__)

_MAX_SESSIONS = 4096  # whose tokens are remembered; those of the latest rounds
_ANSWER_SECONDS = 0.25  # kept back from a deadline, so that the reason still reaches the client
_CONTROL_CALLS = 4  # of a session, beside its calls with tensors: it can always leave
_GRACE_SECONDS = 1.0  # after a call's time, in which its own deadline is answered

Frame = TypeVar("Frame")
Context = grpc.ServicerContext


class Answering(AbstractContextManager["Answering"]):
    """Turns what is raised inside its block into the call's status, here and nowhere else.

    Args:
        context: The call's gRPC context.
        method: Its name, for the log.
        refusals: Notes refused calls.
        counts: Whether a refusal of this call makes its caller's next ones slower.

    Attributes:
        header: What the call says of itself, once it has been read; for the audit log.
        digest: Digest of what arrived.
    """

    def __init__(
        self, context: Context, method: str, refusals: RefusalLog, *, counts: bool = True
    ) -> None:
        self._counts = counts
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
        token = None
        if error is not None or self._refusals.audit is not None:
            token = bearer_in(self._context.invocation_metadata())
        if self._refusals.audit is not None:
            name = common_name(self._context)
            told = Told(self._context.peer(), token, self._method, self.header, self.digest, name)
            self._refusals.tell(told, error)
        if error is not None:
            given = token if token and self._counts else ""
            self._refusals.end_call(self._context, self._method, error, given)


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
    if token is None:
        rule = 'a call must carry the metadata "authorization: Bearer <token>".'
        raise TrunkRefused(RefusalReason.UNAUTHENTICATED, rule)
    return token


def deadline_of(context: Context, at_most: float = math.inf) -> float:
    """Return the call's deadline on the monotonic clock, early enough that the answer arrives.

    It is ``at_most`` seconds away, whatever the caller asks for.

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
        """Refuse a call (its token, session and epoch) that another token opened, or another process.

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
                "the trunk knows no such session. Open a session for every round.",
            )
        if not same_token(token, expected):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                "the token of this call is not the one that opened its session.",
            )


def same_token(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


class FirstFrames(Closing):
    """Reads the first frame of every call: a stream says what it is within seconds.

    gRPC reads by blocking a thread until the peer sends something or ends the call. So a thread of a
    pool of its own waits for the first frame, and the worker waits for that thread, while it may.

    Args:
        seconds: Time that a call has to send it (``trunk.first-frame-timeout``).
        threads: Calls that may be read at once, with those given up a moment ago.
    """

    def __init__(self, seconds: float, threads: int) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="trunk-first-frame")

    def of(self, requests: Iterator[Frame]) -> Iterator[Frame]:
        """Return the frames of a call, once the first of them is there, or the call has ended.

        Raises:
            TrunkUnavailable: It is not there in time, or the trunk stops. The call ends with that,
                and so does the wait for the frame.
            grpc.RpcError: The call was cut off.
        """
        try:
            frame = self._pool.submit(next, requests, None).result(self._seconds)
        except RuntimeError as error:  # the pool has ended
            raise TrunkUnavailable("the trunk stops; it takes no more calls.") from error
        except FutureTimeoutError:
            key = "trunk.first-frame-timeout"
            raise TrunkUnavailable(f"no frame came within {self._seconds:g} s ({key}).") from None
        return chain(() if frame is None else (frame,), requests)

    def close(self) -> None:
        """Take no more calls; those that are read end with the server."""
        self._pool.shutdown(wait=False)


class Quotas:
    """Places and bytes of the calls in progress. Thread-safe: a lock of its own, taken last.

    Args:
        waiting: Calls that may wait for others at once, of all sessions.
        limits: Limits on one session.
        max_call_seconds: Until a call is cut off.

    Attributes:
        full: Tokens that have been refused for their calls in progress. Read without the lock.
    """

    def __init__(self, waiting: int, limits: Limits, max_call_seconds: float) -> None:
        self.limits, self._most_unread = limits, limits.unread
        self.full: set[str] = set()
        self._waiting = waiting
        self._max_seconds = max_call_seconds + _GRACE_SECONDS
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._calls: Counter[str] = Counter()  # by token
        self._bytes: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()  # replies that have not left
        self._open: dict[Holding, float] = {}  # until when
        self._ended: deque[Holding] = deque()  # calls that are over, to be counted out

    def enter(self, place: "Holding") -> None:
        """Count a call in.

        Raises:
            TrunkRefused: Its session makes too many, or leaves replies unread (OVER_BUDGET).
            TrunkBusy: Too many calls wait.
        """
        token = place.token
        with self._lock:
            over = self._above_share(token, control=place.control)
            if over is not None:
                raise over
            if place.waits and self._num_waiting >= self._waiting:
                raise TrunkBusy(f"{self._waiting} calls wait at the trunk; try this one again.")
            self._calls[token] += 1
            self._num_waiting += place.waits
            self._open[place] = time.monotonic() + self._max_seconds
        # Called where the call's last byte has left, on the thread that accepts calls: no lock there.
        if not place.context.add_callback(partial(self._ended.append, place)):
            self._ended.append(place)  # it is over already: its caller has gone

    def above_share(self, token: str, *, control: bool) -> TrunkRefused | None:
        """Return why a session's next call would be too many now; None: it would not."""
        with self._lock:
            return self._above_share(token, control=control)

    def announce(self, place: "Holding", num_bytes: int) -> None:
        """Count the bytes of a call's tensors in, before anything is allocated for them.

        Raises:
            TrunkRefused: Its session holds too many (OVER_BUDGET).
        """
        with self._lock:
            held = self._bytes[place.token]
            if held + num_bytes > self.limits.call_bytes:
                raise self.limits.over_bytes(held, num_bytes)
            self._bytes[place.token] = held + num_bytes
            place.num_bytes += num_bytes

    def leave(self, place: "Holding") -> None:
        """Count a call out, with what it announced; its reply is yet to leave."""
        with self._lock:
            self._num_waiting -= place.waits
            self._calls[place.token] -= 1
            self._bytes[place.token] -= place.num_bytes
            self._unread[place.token] += 1

    def end_overdue(self) -> None:
        """Cut off the calls that take too long, whatever their workers wait for."""
        now = time.monotonic()
        with self._lock:
            self._forget_ended()
            overdue = [place for place, until in self._open.items() if until < now]
        for place in overdue:
            place.context.cancel()

    def _above_share(self, token: str, *, control: bool) -> TrunkRefused | None:
        self._forget_ended()
        over = None
        if self._calls[token] >= self.limits.calls + (_CONTROL_CALLS if control else 0):
            over = self.limits.over_calls()
        elif self._unread[token] >= self._most_unread:
            over = self.limits.over_unread()
        (self.full.discard if over is None else self.full.add)(token)
        return over

    def _forget_ended(self) -> None:
        """Count out whose reply has left, or has nobody to read it."""
        while self._ended:
            place = self._ended.popleft()
            self._open.pop(place, None)
            self._unread[place.token] -= 1
            for counts in (self._calls, self._bytes, self._unread):
                if not counts[place.token]:
                    del counts[place.token]


class Holding(AbstractContextManager["Holding"]):
    """One call's place: in its block for the call, after it for its reply.

    Args:
        quotas: Counts the trunk's calls in progress.
        context: The call's gRPC context.
        waits: Whether it may wait for other clients.
        control: Whether it carries no tensors.
    """

    def __init__(
        self, quotas: Quotas, context: Context, *, waits: bool, control: bool = False
    ) -> None:
        self.token = token_of(context)
        self.waits = waits
        self.control = control
        self.num_bytes = 0  # of its tensors, as announced and decoded
        self.context = context
        self._quotas = quotas

    def __enter__(self) -> "Holding":
        """Count the call in."""
        self._quotas.enter(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Count it out."""
        self._quotas.leave(self)

    def announce(self, tensors: Iterable[pb.TensorSpec]) -> None:
        """Look at what the call's header announces.

        Raises:
            TrunkRefused: It is more than a call, or its session, may have (OVER_BUDGET).
        """
        total, limits = 0, self._quotas.limits
        for spec in tensors:
            shape = spec.shape
            if len(shape) == 3 and shape[0] * shape[1] > limits.call_positions:
                raise limits.over_positions(shape[0], shape[1])
            total += spec.num_bytes
        self._quotas.announce(self, total)
