"""What carries calls to a trunk: the seam for transports beside gRPC.

A transport sends a call until it is answered or its time is over, always with the same bytes, and
raises the errors of :mod:`flower_split.errors`. :class:`~flower_split.wire.grpc_transport.TrunkChannel`
is one.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from google.protobuf.message import Message
from torch import Tensor

from flower_split.wire.sending import Outgoing

Reply = TypeVar("Reply", bound=Message)
Result = TypeVar("Result")


class Transport(Protocol):
    """A client's or the coordinator's way to one trunk. Thread-safe.

    Every call raises:

    - :class:`~flower_split.errors.TrunkUnavailable`: no answer within the time;
    - :class:`~flower_split.errors.TrunkRefused`: the trunk answered no; the reason is typed;
    - :class:`~flower_split.errors.RoundAborted`: the round was given up;
    - :class:`~flower_split.errors.TrunkError`: anything else.
    """

    def unary(
        self,
        method: str,
        request: Message,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Reply:
        """Make one control call.

        Args:
            method: ``OpenSession``, ``BeginRound``, ...
            request: Its message.
            reply_type: The message of its reply.
            timeout: Seconds, retries included; None: the transport's own.
            retry: Whether to ask again after a failure that may pass.
        """

    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends frames and reads frames.

        Args:
            method: ``Forward`` or ``Backward``.
            message: Sent again in full by every attempt.
            read: Consumes the reply's frames to their end.
        """

    def download(
        self, method: str, request: Message, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends a message and reads frames; see :meth:`stream`."""

    def close(self) -> None:
        """Close the connections; calls in progress end. Idempotent."""


@runtime_checkable
class DeviceTransport(Protocol):
    """A transport that may take tensors where they lie on a GPU; others are given CPU tensors."""

    def takes(self, tensor: Tensor) -> bool:
        """Return whether messages may have tensors like this one that stay on their GPU.

        Called before every call with tensors of a GPU; the answer is kept.
        """
        ...
