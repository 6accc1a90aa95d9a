"""gRPC as this package uses it: options, credentials, deadlines, retries, status codes and errors.

Status codes and errors, in both directions:

====================  ==================================================  =================
raised at the trunk   status code                                         raised at the client
====================  ==================================================  =================
TrunkRefused          FAILED_PRECONDITION (UNAUTHENTICATED and            TrunkRefused, same reason
                      RESOURCE_EXHAUSTED for those two reasons), with
                      the typed ``Refusal`` in the trailing metadata
RoundAborted          ABORTED                                             RoundAborted
TrunkUnavailable      DEADLINE_EXCEEDED                                   retried, TrunkUnavailable
TrunkBusy             UNAVAILABLE                                         retried, TrunkUnavailable
CodecError            INVALID_ARGUMENT                                    TrunkRefused
anything else         INTERNAL, with the id of the trunk's log entry      TrunkError
====================  ==================================================  =================

Only UNAVAILABLE and DEADLINE_EXCEEDED are retried, with the same bytes: every call names what it is
about, so the trunk recognises a repetition.
"""

import ipaddress
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message

from flower_split.errors import (
    CodecError,
    ConfigError,
    FlowerSplitError,
    RefusalReason,
    RoundAborted,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.frames import Outgoing

logger = logging.getLogger(__name__)

SERVICE = "flower_split.Trunk"
MAX_MESSAGE_BYTES = 8 << 20
REFUSAL_KEY = "flower-split-refusal-bin"
_MAX_DETAILS = 2000  # characters; trailing metadata as a whole may have 8 KiB
_FIRST_BACKOFF, _LAST_BACKOFF = 0.05, 2.0  # seconds

Reply = TypeVar("Reply", bound=Message)
Result = TypeVar("Result")
Metadata = tuple[tuple[str, str], ...]


class _Replies(Protocol):
    """A call whose reply is a stream of frames."""

    def __iter__(self) -> Iterator[bytes]: ...

    def cancel(self) -> bool: ...


class TrunkBusy(TrunkError):
    """The trunk has no worker free for a call that may wait; the client tries again."""


# ---------------------------------------------------------------- options and credentials


def channel_options() -> list[tuple[str, int]]:
    """Of every client channel. The keepalive interval is above the server's minimum."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),  # retries are counted and bounded here, not below
        ("grpc.use_local_subchannel_pool", 1),  # control calls get a connection of their own
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def server_options() -> list[tuple[str, int]]:
    """Of the trunk server."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),  # a second trunk on the same port must fail, not share it
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_channel(address: str, root_certificates: str = "") -> grpc.Channel:
    """A channel with this package's options; it connects with the first call.

    Args:
        address: ``host:port``.
        root_certificates: The CA that signed the trunk's certificate, as PEM text or the path of a
            PEM file; empty: plain text, on loopback only.

    Raises:
        ConfigError: Plain text to another machine, or a PEM file that cannot be read.
    """
    if root_certificates:
        if "-----BEGIN" in root_certificates:
            pem = root_certificates.encode()
        else:
            pem = read_pem("trunk.root-certificates", root_certificates)
        credentials = grpc.ssl_channel_credentials(root_certificates=pem)
        return grpc.secure_channel(address, credentials, options=channel_options())
    if not is_loopback(address):
        raise ConfigError(
            f"the trunk at {address} is not on this machine's loopback, where alone plain text is "
            "allowed: tokens and activations would travel readable. Give the CA's PEM file as "
            "trunk.root-certificates and start the trunk with --tls-certificate and --tls-key."
        )
    return grpc.insecure_channel(address, options=channel_options())


def read_pem(key: str, path: str) -> bytes:
    """The content of a PEM file.

    Raises:
        ConfigError: It cannot be read, or is not PEM.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} must name a readable PEM file; {path!r}: {error}.") from error
    if b"-----BEGIN" not in content:
        raise ConfigError(f"{key} must name a PEM file; {path!r} holds no PEM block.")
    return content


# ---------------------------------------------------------------- status <-> error


def status_of(error: FlowerSplitError) -> tuple[grpc.StatusCode, str, pb.Refusal | None]:
    """The status code, its text, and the typed refusal if ``error`` is one."""
    text = str(error)[:_MAX_DETAILS]
    if isinstance(error, TrunkRefused):
        code = {
            RefusalReason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
            RefusalReason.OVER_BUDGET: grpc.StatusCode.RESOURCE_EXHAUSTED,
        }.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION)
        reason = pb.Refusal.Reason.Name(error.reason.value)
        return code, text, pb.Refusal(reason=reason, message=text)
    if isinstance(error, RoundAborted):
        return grpc.StatusCode.ABORTED, text, None
    if isinstance(error, TrunkBusy):
        return grpc.StatusCode.UNAVAILABLE, text, None
    if isinstance(error, TrunkUnavailable):
        return grpc.StatusCode.DEADLINE_EXCEEDED, text, None
    if isinstance(error, CodecError):
        return grpc.StatusCode.INVALID_ARGUMENT, text, None
    return grpc.StatusCode.INTERNAL, text, None


def error_of(error: grpc.RpcError, what: str) -> TrunkError:
    """The error that a status which is not retried stands for.

    Args:
        error: From the call.
        what: The call and the address, for the message.
    """
    code, text = _failed(error).code(), _failed(error).details()
    refusal = _refusal(error)
    if refusal is not None:
        return refusal
    if code is grpc.StatusCode.ABORTED:
        return RoundAborted(text)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return TrunkRefused(RefusalReason.UNAUTHENTICATED, text)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return TrunkRefused(RefusalReason.INVALID_REQUEST, text)
    if code is grpc.StatusCode.CANCELLED:
        return TrunkUnavailable(
            f"{what} was cut off: {text}. The trunk or the connection has ended."
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return TrunkError(
            f"{what}: the server there is not a trunk of this protocol version ({text}). Run the "
            "same version of flower-split on both sides, and check trunk.address."
        )
    return TrunkError(f"{what} failed with {code.name}: {text}")


def _failed(error: grpc.RpcError) -> grpc.Call:
    """What grpc raises is the call itself, which its types do not say."""
    return cast(grpc.Call, error)


def _refusal(error: grpc.RpcError) -> TrunkRefused | None:
    for key, value in _failed(error).trailing_metadata() or ():
        if key == REFUSAL_KEY and isinstance(value, bytes):
            refusal = pb.Refusal.FromString(value)
            known = {reason.value: reason for reason in RefusalReason}
            reason = known.get(refusal.reason, RefusalReason.INVALID_REQUEST)
            return TrunkRefused(reason, refusal.message)
    return None


def bearer(token: str) -> Metadata:
    """The metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


# ---------------------------------------------------------------- the client's calls


class TrunkChannel:
    """A client's two connections to a trunk: one for tensors, one for control calls. Thread-safe.

    Args:
        address: ``host:port``.
        token: Sent with every call.
        root_certificates: See :func:`open_channel`.
        timeout: Seconds that one call may take, retries included. An attempt gets half of the time
            that is left, so that a trunk which hangs or is replaced is asked again.

    Raises:
        ConfigError: See :func:`open_channel`.
    """

    def __init__(
        self, address: str, *, token: str, timeout: float, root_certificates: str = ""
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._metadata = bearer(token)
        self._jitter = random.Random()  # its own: a retry must not shift a seeded run's numbers
        self._control = open_channel(address, root_certificates)
        self._data = open_channel(address, root_certificates)

    def unary(
        self,
        method: str,
        request: Message,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Reply:
        """One control call.

        Raises:
            TrunkUnavailable: No answer within the time.
            TrunkRefused: The trunk answered no.
            RoundAborted: The round was given up.
            TrunkError: Anything else.
        """
        call: grpc.UnaryUnaryMultiCallable[Message, Reply] = self._control.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply_type.FromString,
        )
        return self._until_answered(
            method,
            timeout,
            retry,
            lambda left: call(request, timeout=left, metadata=self._metadata),
        )

    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """One call that sends frames and reads frames.

        Args:
            method: ``Forward`` or ``Backward``.
            message: Sent again in full by every attempt.
            read: Consumes the reply's frames to their end.

        Raises:
            TrunkError: As :meth:`unary`.
            CodecError: From ``read``.
        """
        start: grpc.StreamStreamMultiCallable[bytes, bytes] = self._data.stream_stream(
            f"/{SERVICE}/{method}"
        )
        return self._until_answered(
            method,
            None,
            True,
            lambda left: _consume(
                start(message.frames(), timeout=left, metadata=self._metadata), read
            ),
        )

    def download(
        self, method: str, request: Message, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """One call that sends a message and reads frames; see :meth:`stream`."""
        start: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._data.unary_stream(
            f"/{SERVICE}/{method}"
        )
        payload = request.SerializeToString()
        return self._until_answered(
            method,
            None,
            True,
            lambda left: _consume(start(payload, timeout=left, metadata=self._metadata), read),
        )

    def close(self) -> None:
        """Close both connections; calls in progress end. Idempotent."""
        self._control.close()
        self._data.close()

    def _until_answered(
        self,
        method: str,
        timeout: float | None,
        retry: bool,
        attempt: Callable[[float], Result],
    ) -> Result:
        """Call ``attempt(seconds)`` until it answers, with backoff, within the time."""
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        what = f"{method} at the trunk {self.address}"
        backoff, attempts = _FIRST_BACKOFF, 0
        while True:
            left = deadline - time.monotonic()
            attempts += 1
            try:
                return attempt(max(left / 2 if retry and left > 2 else left, 0.001))
            except grpc.RpcError as error:
                code, text = _failed(error).code(), _failed(error).details()
                if code not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ):
                    raise error_of(error, what) from None
            except ValueError as error:  # how grpc says that the channel is closed
                raise TrunkError(f"{what}: the connection has been closed ({error}).") from error
            pause = backoff * self._jitter.uniform(0.5, 1.5)
            backoff = min(2 * backoff, _LAST_BACKOFF)
            if not retry or time.monotonic() + pause >= deadline:
                raise TrunkUnavailable(
                    f"{what} was not answered within {timeout:g} s ({attempts} attempts, the last: "
                    f"{code.name}, {text}). Check that the trunk runs and that this machine reaches "
                    f"it at {self.address} (trunk.address); if it is only slow, raise "
                    "trunk.call-timeout."
                )
            logger.debug("%s: attempt %d gave %s; again in %.2f s", what, attempts, code, pause)
            time.sleep(pause)


def _consume(call: _Replies, read: Callable[[Iterator[bytes]], Result]) -> Result:
    """Read a reply; a call whose reply is not read to its end is cancelled."""
    try:
        return read(iter(call))
    finally:
        call.cancel()
