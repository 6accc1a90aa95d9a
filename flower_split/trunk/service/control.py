"""Control calls: one request and one reply, both small messages without tensors.

They are served as streams: a worker that waited for the one request inside gRPC would wait as long as
the caller likes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from flower_split.errors import CodecError
from flower_split.trunk.service.handlers import Answering, Context, FirstFrames
from flower_split.trunk.service.refusals import RefusalLog

Request = TypeVar("Request", bound=Message)

# Of a client: a few may be in progress beside its calls with tensors.
CONTROL_CALLS = frozenset(
    {"OpenSession", "WaitVersion", "ShortenPlan", "CloseSession", "ShareMemory"}
)


def _let_in(context: Context) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class ControlCalls:
    """Makes the handlers of one caller's control calls.

    Args:
        refusals: Notes refused calls.
        first_frames: Reads the request.
    """

    refusals: RefusalLog
    first_frames: FirstFrames

    def handler(
        self,
        request_type: type[Request],
        behaviour: Callable[[Request, Context], Message],
        admit: Callable[[Context], AbstractContextManager[object]] = _let_in,
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Return a handler: the request's bytes parsed, the reply's serialised.

        Args:
            request_type: Type of the request.
            behaviour: Answers it.
            admit: Raises for a caller who may not make it, before anything of the request is read;
                what it returns is entered around the call.
        """
        name = request_type.DESCRIPTOR.name.removesuffix("Request")

        def handle(requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
            with Answering(context, name, self.refusals) as call, admit(context):
                data = next(self.first_frames.of(requests), None)
                if data is None:
                    raise CodecError("the call ended before its request.")
                call.header = request = parsed(request_type, data)
                return iter((behaviour(request, context).SerializeToString(),))

        return grpc.stream_stream_rpc_method_handler(handle)


def parsed(request_type: type[Request], data: bytes) -> Request:
    """Return the request of a control call.

    Raises:
        CodecError: The bytes are not that message.
    """
    try:
        return request_type.FromString(data)
    except (DecodeError, ValueError) as error:  # by the version of protobuf, one is the other
        raise CodecError("the request is not a valid protobuf message.") from error
