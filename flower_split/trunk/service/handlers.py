"""What every method of the trunk's RPC shell does around its work: tokens, deadlines, statuses."""

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from flower_split.errors import CodecError, FlowerSplitError, RefusalReason, TrunkRefused
from flower_split.wire.channel import REFUSAL_KEY, TrunkBusy, status_of
from flower_split.wire.frames import Incoming

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 0.25  # kept back from a deadline, so that the reason still reaches the client

Value = TypeVar("Value")
Request = TypeVar("Request", bound=Message)
Context = grpc.ServicerContext


class WaitingPlace:
    """A place among the calls that may wait; without one the client is told to try again."""

    def __init__(self, places: threading.BoundedSemaphore, count: int) -> None:
        self._places = places
        self._count = count

    def __enter__(self) -> None:
        """Take a place.

        Raises:
            TrunkBusy: All are taken.
        """
        if not self._places.acquire(blocking=False):
            raise TrunkBusy(
                f"{self._count} calls wait at the trunk already; this one comes again later."
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        self._places.release()


def answered(context: Context, method: str, work: Callable[[], Value]) -> Value:
    """The result of ``work``; what it raises becomes the call's status, here and nowhere else."""
    try:
        return work()
    except FlowerSplitError as error:
        code, text, refusal = status_of(error)
        if refusal is not None:
            context.set_trailing_metadata(((REFUSAL_KEY, refusal.SerializeToString()),))
        logger.debug("%s: %s, %s", method, code.name, text)
        _abort(context, code, text)
    except grpc.RpcError:
        raise  # the client has gone; nobody is there to be told
    except Exception:
        incident = secrets.token_hex(4)
        logger.exception("%s failed, incident %s", method, incident)
        _abort(
            context,
            grpc.StatusCode.INTERNAL,
            f"the trunk failed at {method}; its log says why under incident {incident}.",
        )


def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("grpc's abort raises")


def parsed(request_type: type[Request], data: bytes) -> Request:
    """A request of a control call.

    Raises:
        CodecError: The bytes are not that message.
    """
    try:
        return request_type.FromString(data)
    except ValueError as error:  # protobuf's DecodeError is one
        raise CodecError("the request is not a valid protobuf message.") from error


def unary(
    request_type: type[Request], behaviour: Callable[[Request, Context], Message]
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    """The handler of a control call: its bytes parsed, its reply's serialised."""
    name = request_type.DESCRIPTOR.name.removesuffix("Request")

    def handle(data: bytes, context: Context) -> bytes:
        def work() -> bytes:
            return behaviour(parsed(request_type, data), context).SerializeToString()

        return answered(context, name, work)

    return grpc.unary_unary_rpc_method_handler(handle)


def expect(incoming: Incoming, call: str) -> None:
    """Check that a stream's header is of ``call``.

    Raises:
        CodecError: It is not.
    """
    found = incoming.header.WhichOneof("call")
    if found != call:
        raise CodecError(f"the header of this call must be of {call!r}; it is of {found!r}.")


def token_of(context: Context) -> str:
    """The bearer token of a call.

    Raises:
        TrunkRefused: It has none.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
            return value.removeprefix("Bearer ")
    raise TrunkRefused(
        RefusalReason.UNAUTHENTICATED,
        'a call must carry the metadata "authorization: Bearer <token>".',
    )


def same_token(given: str, expected: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


def deadline_of(context: Context) -> float:
    """The call's deadline on the monotonic clock, a moment early: the answer must arrive in time.

    Raises:
        CodecError: The call has none.
    """
    remaining = context.time_remaining()
    if remaining is None or remaining > 86_400:
        raise CodecError("every call to the trunk must have a deadline of at most a day.")
    return time.monotonic() + remaining - min(_ANSWER_SECONDS, 0.2 * remaining)
