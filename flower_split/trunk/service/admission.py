"""Who is let in: a call without a known credential is answered before a worker waits for it.

The synchronous server gives every call a worker, which then waits for the call's first message. The
check therefore runs when the call's metadata has arrived: a stranger's call gets a handler that reads
nothing and answers in the same words whatever is wrong with its credential. So does a participant's call
above its share. Refusals have a rate (:mod:`flower_split.trunk.service.pacing`); no worker waits for it.
"""

import heapq
import hmac
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from flower_split.errors import (
    CodecError,
    ConfigError,
    RefusalReason,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.runtime.secret_files import TokenFile
from flower_split.trunk.service.client_certificates import UNKNOWN_TOKEN, CertificateGate
from flower_split.trunk.service.control import CONTROL_CALLS
from flower_split.trunk.service.handlers import (
    Answering,
    Context,
    FirstFrames,
    Quotas,
    bearer_in,
)
from flower_split.trunk.service.limits import over_checks, over_refusals
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.wire.grpc_options import PROOF, SERVICE
from flower_split.wire.possession import KEY_MARK, proven_number

_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_POOL = "experimental_thread_pool"  # gRPC's name for the pool that a behaviour runs in
_SEEN = 1024  # numbers of one token's proofs that are remembered; all below them count as used
_MAX_TOKENS = 4096  # whose numbers are remembered; those of the latest rounds
_HEALTH_WORKERS = 4  # that health checks, which need no credential, may hold at once

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class CoordinatorTokens:
    """The coordinators' credentials: one token each, or those that a file has at the moment. Thread-safe.

    Args:
        source: The token of the trunk's own coordinator, or the file that has it and may change.
        others: Those of further coordinators, by name, each with experiments of its own.

    Raises:
        ConfigError: The token is empty, or two coordinators have the same.
    """

    def __init__(self, source: str | TokenFile, others: Mapping[str, TokenFile]) -> None:
        if not source:
            raise ConfigError("the trunk needs a coordinator token; it is empty.")
        self._sources: dict[str, str | TokenFile] = {"": source, **others}
        for name, file in others.items():
            found = next(
                (owner for t in file.tokens() if (owner := self.owner_of(t)) != name), name
            )
            if found != name:
                raise ConfigError(
                    f"--coordinator {name} has a token that is {found or 'the trunk'}'s own, too, so that "
                    "their experiments would not be apart. Make one for each."
                )

    def owner_of(self, token: str) -> str | None:
        """Return whose token a call has, in a time that does not tell how nearly; None: nobody's.

        The trunk's own coordinator is the empty name.
        """
        given = token.encode()  # compared with all of them, every time
        found = None
        for name, source in self._sources.items():
            tokens = (source,) if isinstance(source, str) else source.tokens()
            if any([hmac.compare_digest(given, known.encode()) for known in tokens]):
                found = name if found is None else found
        return found


class PossessionCheck:
    """Checks the proofs of calls, and that none is used twice. Thread-safe; it never waits."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[str, UsedNumbers] = OrderedDict()  # by token, least used first
        self._lock = threading.Lock()

    def passes(self, token: str, method: str, proof: bytes) -> bool:
        """Return whether a call may use its token: it names no key, or the proof is good and new.

        Args:
            token: One that the trunk knows.
            method: The call's full name.
            proof: What the call carries; empty: nothing.
        """
        if KEY_MARK not in token:
            return True
        number = proven_number(token, method, proof)
        if number is None:
            return False
        with self._lock:
            numbers = self._numbers.setdefault(token, UsedNumbers())
            self._numbers.move_to_end(token)
            while len(self._numbers) > _MAX_TOKENS:
                self._numbers.popitem(last=False)
            return numbers.use(number)


class UsedNumbers:
    """The latest numbers that calls with one token have used."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._lowest: list[int] = []  # a heap of the same numbers
        self._floor = 0  # it and what is below count as used

    def use(self, number: int) -> bool:
        """Note a number; return whether it had not been used."""
        if number <= self._floor or number in self._seen:
            return False
        self._seen.add(number)
        heapq.heappush(self._lowest, number)
        if len(self._lowest) > _SEEN:
            self._floor = heapq.heappop(self._lowest)
            self._seen.remove(self._floor)
        return True


class Admission(grpc.ServerInterceptor):
    """Lets calls pass that carry a credential which is known now, and health checks a few at once.

    Args:
        coordinator_token: The coordinators'.
        knows_token: Whether a token is a participant's. Called on the thread that accepts calls, so
            it must not wait.
        refusals: Notes who was refused.
        first_frames: Reads the request of a health check.
        full: Tokens that have been refused for their calls in progress; others change it.
        quotas_of: Returns the quotas of a participant's calls in progress; waits for nothing.
        gate: Checks the certificates of calls; None: there are none.
    """

    def __init__(
        self,
        coordinator_token: CoordinatorTokens,
        knows_token: Callable[[str], bool],
        refusals: RefusalLog,
        first_frames: FirstFrames,
        full: Collection[str],
        quotas_of: Callable[[str], Quotas | None],
        gate: CertificateGate | None = None,
    ) -> None:
        self._full, self._quotas_of = full, quotas_of
        self._gate = gate
        self._coordinator_token = coordinator_token
        self._knows_token = knows_token
        self._refusals = refusals
        self._first_frames = first_frames
        self._health = threading.BoundedSemaphore(_HEALTH_WORKERS)
        self._proofs = PossessionCheck()

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Request, Reply] | None]",
        details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Request, Reply] | None":
        """Return the call's own handler, or the one that refuses it."""
        service, _, method = details.method.lstrip("/").partition("/")
        if details.method == _HEALTH_CHECK:
            if not self._refusals.pace.is_over(_HEALTH_CHECK):
                self._refusals.pace.count(_HEALTH_CHECK)
                return self._limited(continuation(details))
            often = self._refusing(method, over_checks(), _HEALTH_CHECK)
            return cast("grpc.RpcMethodHandler[Request, Reply]", often)
        if service != SERVICE:
            return None
        token = bearer_in(details.invocation_metadata)
        if token is not None:
            coordinator = not self._knows_token(token)
            if coordinator:
                admitted = self._coordinator_token.owner_of(token) is not None
            else:
                admitted = KEY_MARK not in token or self._proofs.passes(
                    token, details.method, _proof_in(details.invocation_metadata)
                )
            if admitted:
                handler = continuation(details)
                refusal = None
                if token in self._refusals.pace.spent or token in self._full:
                    refusal = None if coordinator else self._above_share(token, method)
                if refusal is not None:
                    refusing = self._refusing(method, refusal, token)
                    handler = cast("grpc.RpcMethodHandler[Request, Reply]", refusing)
                if self._gate is None or handler is None:
                    return handler
                gate, refusals = self._gate, self._refusals

                def check(context: Context) -> None:
                    try:
                        gate.check(context, token, coordinator=coordinator)
                    except TrunkRefused as refusal:
                        with Answering(context, method, refusals):
                            raise refusal

                return _checked(handler, check)
        stranger = TrunkRefused(RefusalReason.UNAUTHENTICATED, UNKNOWN_TOKEN)
        # Nothing is read or written by it, so the types of requests and replies are no matter.
        return cast("grpc.RpcMethodHandler[Request, Reply]", self._refusing(method, stranger))

    def _above_share(self, token: str, method: str) -> TrunkRefused | None:
        """Return why a participant's call is refused before anything is done for it; None: it is not."""
        if self._refusals.pace.is_over(token):
            return over_refusals()
        quotas = self._quotas_of(token)
        if quotas is None:
            return None
        return quotas.above_share(token, control=method in CONTROL_CALLS)

    def _refusing(
        self, method: str, refusal: TrunkRefused, token: str = ""
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Return a handler that refuses a call when the refusal of its caller is due."""

        def refuse(requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
            with Answering(context, method, self._refusals, counts=False):
                raise refusal

        setattr(refuse, _POOL, self._refusals.pace.lane(token))
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _limited(
        self, handler: "grpc.RpcMethodHandler[Request, Reply] | None"
    ) -> "grpc.RpcMethodHandler[Request, Reply] | None":
        """Return a health check whose wait for its message holds one of a few permits.

        It reads the message itself: what gRPC cannot read becomes INTERNAL there, with a traceback.
        """
        if handler is None or handler.unary_unary is None or handler.request_deserializer is None:
            return None
        answer, read = handler.unary_unary, handler.request_deserializer

        def check(requests: Iterator[bytes], context: Context) -> Iterator[Reply]:
            if not self._health.acquire(blocking=False):
                context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"the trunk answers {_HEALTH_WORKERS} health checks at once; ask again.",
                )
            try:
                for data in self._first_frames.of(requests):
                    try:
                        request = read(data)
                    except (DecodeError, ValueError):
                        with Answering(context, "Check", self._refusals, counts=False):
                            raise CodecError("a health check is one protobuf message.") from None
                    yield answer(request, context)
                    return
            except TrunkUnavailable as error:
                context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
            finally:
                self._health.release()

        checked: grpc.RpcMethodHandler[bytes, Reply] = grpc.stream_stream_rpc_method_handler(
            check, response_serializer=handler.response_serializer
        )
        return cast("grpc.RpcMethodHandler[Request, Reply]", checked)


def _proof_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> bytes:
    """Return what a call proves itself with, among its metadata; empty: nothing."""
    for key, value in metadata or ():
        if key == PROOF and isinstance(value, bytes):
            return value
    return b""


def _checked(
    handler: "grpc.RpcMethodHandler[Request, Reply]", check: Callable[[Context], None]
) -> "grpc.RpcMethodHandler[Request, Reply]":
    """Return a handler that runs ``check``, which ends the call or returns, before its own behaviour."""

    def first(behaviour: Callable[[Asked, Context], Answer]) -> Callable[[Asked, Context], Answer]:
        def run(asked: Asked, context: Context) -> Answer:
            check(context)
            return behaviour(asked, context)

        if hasattr(behaviour, _POOL):
            setattr(run, _POOL, getattr(behaviour, _POOL))
        return run

    forms = handler.request_deserializer, handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(first(handler.unary_unary), *forms)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(first(handler.unary_stream), *forms)
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(first(handler.stream_stream), *forms)
    raise TypeError("the trunk has no methods of another kind")
