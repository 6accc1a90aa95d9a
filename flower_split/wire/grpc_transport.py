"""A transport over gRPC: two connections, deadlines, and retries that repeat the same bytes.

Only UNAVAILABLE and DEADLINE_EXCEEDED are retried, and no TLS handshake that failed: every call names
what it is about, so the trunk recognises a repetition. :mod:`flower_split.wire.grpc_status` says what
the other codes mean.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import grpc
from google.protobuf.message import Message

from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import TrunkError, TrunkUnavailable
from flower_split.runtime.closing import Closing
from flower_split.runtime.secret_files import TokenFile
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.wire.certificate_errors import certificate_fault
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_options import (
    PROOF,
    SERVICE,
    Metadata,
    bearer,
    is_loopback,
    open_channel,
)
from flower_split.wire.grpc_status import error_of, failed_call
from flower_split.wire.possession import ClientKey
from flower_split.wire.proxies import proxy_to, without_credentials
from flower_split.wire.sending import Outgoing
from flower_split.wire.tls_errors import tls_fault
from flower_split.wire.transport import Reply, Result

logger = logging.getLogger(__name__)

_FIRST_BACKOFF, _LAST_BACKOFF = 0.05, 2.0  # seconds
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class _Replies(Protocol):
    """A call whose reply is a stream of frames."""

    def __iter__(self) -> Iterator[bytes]: ...

    def cancel(self) -> bool: ...


class TrunkChannel(Closing):
    """A :class:`~flower_split.wire.transport.Transport` of two connections.

    One carries tensors, the other control calls, which must not wait behind a large tensor.

    Args:
        address: ``host:port``.
        token: Sent with every call; of a file, as it is at that moment.
        key: With which every call proves that the token is its own; None: the token needs no proof.
        root_certificates: See :func:`open_channel`.
        certificate: What this side shows over TLS; read now.
        proxy: As ``trunk.proxy`` says.
        timeout: Seconds that one call may take, retries included. An attempt gets half of the time
            that is left, so that a trunk which hangs or is replaced is asked again.

    Raises:
        ConfigError: See :func:`open_channel`.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | TokenFile,
        timeout: float,
        key: ClientKey | None = None,
        root_certificates: str = "",
        certificate: ClientCertificate = NO_CERTIFICATE,
        proxy: str = ENVIRONMENT,
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._token, self._key = token, key
        self._bearer = () if isinstance(token, TokenFile) else bearer(token)
        self._tls, self._certificate = bool(root_certificates), certificate
        self._jitter = random.Random()  # its own: a retry must not shift a seeded run's numbers
        self._control = open_channel(address, root_certificates, certificate, proxy)
        self._data = open_channel(address, root_certificates, certificate, proxy)
        self._proxy = "" if is_loopback(address) else proxy_to(address, proxy)
        self._tracing = PROCESS_TRACING.current
        self._asking: Callable[[str], AbstractContextManager[object]] = (
            nullcontext if self._tracing is None else self._tracing.asking
        )
        if self._proxy:
            logger.info("the trunk %s is asked%s", address, self._way())

    def unary(
        self,
        method: str,
        request: Message,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Reply:
        """Make one control call; see :class:`~flower_split.wire.transport.Transport`."""
        call: grpc.UnaryUnaryMultiCallable[Message, Reply] = self._control.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply_type.FromString,
        )
        return self._until_answered(
            method,
            timeout,
            retry,
            lambda left: call(request, timeout=left, metadata=self._metadata(method)),
        )

    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends and reads frames; see ``Transport``. ``read`` may raise, too."""
        if len(message.plan) == 1:
            ((prefix, _),) = message.plan
            return self._ask_once(method, b"".join((prefix, *message.payloads)), read)
        start: grpc.StreamStreamMultiCallable[bytes, bytes] = self._data.stream_stream(
            f"/{SERVICE}/{method}"
        )
        return self._until_answered(
            method,
            None,
            True,
            lambda left: _consume(
                start(message.frames(), timeout=left, metadata=self._metadata(method)), read
            ),
        )

    def download(
        self, method: str, request: Message, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends a message and reads frames; see :meth:`stream`."""
        return self._ask_once(method, request.SerializeToString(), read)

    def _ask_once(
        self, method: str, request: bytes, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call of one message, which needs no thread beside the caller's."""
        start: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._data.unary_stream(
            f"/{SERVICE}/{method}"
        )
        return self._until_answered(
            method,
            None,
            True,
            lambda left: _consume(
                start(request, timeout=left, metadata=self._metadata(method)), read
            ),
        )

    def close(self) -> None:
        """Close both connections; calls in progress end. Idempotent."""
        self._control.close()
        self._data.close()

    def _fault(self, text: str | None) -> str:
        """Return what is wrong with the TLS; empty: nothing, or what trying again may mend."""
        return tls_fault(text) or (
            certificate_fault(text, self.address, self._certificate, self._proxy)
            if self._tls
            else ""
        )

    def _way(self) -> str:
        return f" through the proxy {without_credentials(self._proxy)}" if self._proxy else ""

    def _metadata(self, method: str) -> Metadata:
        """Return the credentials of one attempt of a call, and, where there are traces, its own."""
        carried = () if self._tracing is None else self._tracing.carried()
        if isinstance(self._token, TokenFile):
            return (*bearer(self._token.tokens()[0]), *carried)
        if self._key is None:
            return (*self._bearer, *carried)
        proof = PROOF, self._key.proof(self._token, f"/{SERVICE}/{method}")
        return (*self._bearer, proof, *carried)

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
                with self._asking(method):
                    return attempt(max(left / 2 if retry and left > 2 else left, 0.001))
            except grpc.RpcError as error:
                code, text = failed_call(error).code(), failed_call(error).details()
                if code not in _RETRIED:
                    raise error_of(error, what) from None
                if fault := self._fault(text):
                    raise TrunkError(f"{what}: no connection, for {fault} ({text}).") from None
            except ValueError as error:  # how grpc says that the channel is closed
                raise TrunkError(f"{what}: the connection has been closed ({error}).") from error
            pause = backoff * self._jitter.uniform(0.5, 1.5)
            backoff = min(2 * backoff, _LAST_BACKOFF)
            if not retry or time.monotonic() + pause >= deadline:
                raise TrunkUnavailable(
                    f"{what} was not answered within {timeout:g} s ({attempts} attempts, the last: "
                    f"{code.name}, {text}). Check that the trunk runs and that this machine reaches "
                    f"it at {self.address}{self._way()} (trunk.address, trunk.proxy; a node config's "
                    "trunk-address, trunk-proxy); if it is only slow, raise trunk.call-timeout."
                )
            logger.debug("%s: attempt %d gave %s; again in %.2f s", what, attempts, code, pause)
            time.sleep(pause)


def _consume(call: _Replies, read: Callable[[Iterator[bytes]], Result]) -> Result:
    """Read a reply; a call whose reply is not read to its end is cancelled."""
    try:
        return read(iter(call))
    finally:
        call.cancel()
