"""The trunk's RPC shell: tokens, limits and deadlines in front of the engine, status codes behind it.

A call is read, checked, handed to the engine and answered; nothing is computed or remembered here
but which token opened which session.

Every call runs on a worker thread of one pool, and some calls wait there for other calls: a forward
for the backwards that complete a window. Calls that may wait therefore get at most three quarters of
the workers; one more is turned away with UNAVAILABLE, which clients try again. So a worker is always
free for the backward that ends the wait, and for the coordinator.

Next: ``flower_split/trunk/engine/engine.py``.
"""

import hashlib
import logging
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
import torch
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from torch import Tensor

from flower_split.errors import CodecError, ConfigError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.convert import (
    cache_from_proto,
    cuts_from_proto,
    grant_to_proto,
    key_from_proto,
)
from flower_split.protocol.values import CallResult, ForwardMode
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.coordinator_calls import CoordinatorCalls
from flower_split.trunk.service.handlers import (
    Context,
    WaitingPlace,
    answered,
    deadline_of,
    expect,
    token_of,
    unary,
)
from flower_split.trunk.service.session_tokens import SessionTokens
from flower_split.wire.buffers import Allocate, pinned, pooled
from flower_split.wire.channel import (
    SERVICE,
    is_loopback,
    read_pem,
    server_options,
)
from flower_split.wire.frames import Incoming, Outgoing, Received
from flower_split.wire.staging import to_host

logger = logging.getLogger(__name__)

MAX_TENSOR_BYTES = 1 << 30
_MIN_WORKERS = 8


class TrunkServer:
    """Serves an engine until it is stopped; the engine stays the caller's to close.

    Args:
        engine: What computes.
        coordinator_token: Who knows it may begin, commit and abort rounds.
        listen: ``host:port``; port 0 takes any free one.
        tls_certificate: PEM file; ``None``: plain text, on loopback only.
        tls_key: PEM file.
        max_workers: Threads; at most three quarters of them hold calls that wait.
        max_tensor_bytes: Limit on the tensors of one call.
        interceptors: Run around every call, as grpc's own.

    Raises:
        ConfigError: Plain text beyond loopback, an empty token, half a key pair, too few workers.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        *,
        coordinator_token: str,
        listen: str = "127.0.0.1:0",
        tls_certificate: str | None = None,
        tls_key: str | None = None,
        max_workers: int = 256,
        max_tensor_bytes: int = MAX_TENSOR_BYTES,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
    ) -> None:
        if not coordinator_token:
            raise ConfigError("the trunk needs a coordinator token; it is empty.")
        if max_workers < _MIN_WORKERS:
            raise ConfigError(f"the trunk needs {_MIN_WORKERS} workers; it has {max_workers}.")
        if bool(tls_certificate) != bool(tls_key):
            raise ConfigError("TLS needs both a certificate and its key; only one is given.")
        if not tls_certificate and not is_loopback(listen):
            raise ConfigError(
                f"the trunk may listen without TLS on loopback only, not on {listen!r}: tokens and "
                "activations would travel readable. Give --tls-certificate and --tls-key, or listen "
                "on 127.0.0.1."
            )
        self._listen = listen
        self._tls = (
            (read_pem("tls-key", tls_key), read_pem("tls-certificate", tls_certificate))
            if tls_certificate and tls_key
            else None
        )
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers, thread_name_prefix="trunk-rpc"),
            options=server_options(),
            interceptors=list(interceptors),
        )
        shell = _Shell(engine, max_workers * 3 // 4, max_tensor_bytes)
        handlers = shell.handlers() | CoordinatorCalls(engine, coordinator_token).handlers()
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def start(self) -> int:
        """Listen and serve; returns the port.

        Raises:
            ConfigError: The address cannot be bound.
        """
        try:
            if self._tls:
                credentials = grpc.ssl_server_credentials([self._tls])
                port = self._server.add_secure_port(self._listen, credentials)
            else:
                port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ConfigError(
                f"the trunk cannot listen on {self._listen!r}: {error}. Is the port taken?"
            ) from error
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        logger.info("trunk serves on port %d (%s)", port, "TLS" if self._tls else "plain text")
        return port

    def stop(self, grace: float = 2.0) -> None:
        """Turn new calls away, give those in progress ``grace`` seconds, then cancel them.

        A cancelled call's thread ends when the engine lets go of it: close the engine afterwards.
        """
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()

    def __enter__(self) -> Self:
        """Serve within a ``with`` block; call :meth:`start` for the port."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop without grace."""
        self.stop(0.0)


class _Shell:
    """The clients' methods over one engine."""

    def __init__(self, engine: TrunkEngine, max_waiting: int, max_tensor_bytes: int) -> None:
        self._engine = engine
        self._max_tensor_bytes = max_tensor_bytes
        self._waiting = threading.BoundedSemaphore(max_waiting)
        self._max_waiting = max_waiting
        self._tokens = SessionTokens(lambda: engine.epoch)

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        """Every method by its name; tensors pass as the bytes they are."""
        return {
            "OpenSession": unary(pb.OpenSessionRequest, self._open_session),
            "WaitVersion": unary(pb.WaitVersionRequest, self._wait_version),
            "CloseSession": unary(pb.CloseSessionRequest, self._close_session),
            "Forward": grpc.stream_stream_rpc_method_handler(self._forward),
            "Backward": grpc.stream_stream_rpc_method_handler(self._backward),
        }

    # ------------------------------------------------------------------ clients

    def _open_session(self, request: pb.OpenSessionRequest, context: Context) -> Message:
        token = token_of(context)
        grant = self._engine.open_session(
            token,
            dict(request.fingerprint),
            request.planned_steps,
            request.evaluate,
            cuts_from_proto(request),
        )
        self._tokens.remember(grant.session, token)
        return grant_to_proto(grant, self._max_tensor_bytes)

    def _wait_version(self, request: pb.WaitVersionRequest, context: Context) -> Message:
        self._tokens.check(context, request.session, request.trunk_epoch)
        with WaitingPlace(self._waiting, self._max_waiting):
            version = self._engine.wait_version(
                request.session, request.trunk_epoch, request.version, deadline_of(context)
            )
        return pb.WaitVersionReply(version=version)

    def _close_session(self, request: pb.CloseSessionRequest, context: Context) -> Message:
        self._tokens.check(context, request.session, request.trunk_epoch)
        self._engine.close_session(request.session, request.trunk_epoch)
        return pb.CloseSessionReply()

    def _forward(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        def work() -> Outgoing:
            deadline = deadline_of(context)
            incoming = Incoming(requests)
            call = incoming.header.forward
            expect(incoming, "forward")
            self._tokens.check(context, call.session, call.trunk_epoch)
            try:
                mode = ForwardMode(call.mode)
            except ValueError:
                raise CodecError(f"the forward has the unknown mode number {call.mode}.") from None
            key = key_from_proto(call.key) if call.HasField("key") else None
            if key is None and mode is not ForwardMode.EVALUATE:
                raise CodecError(f"a forward in mode {mode.name} must carry a contribution key.")
            cached = call.HasField("cache")
            received = self._receive(incoming, digest=cached or mode is not ForwardMode.EVALUATE)
            tensors = received.tensors
            rows = tensors.pop("cache_rows", None)
            mask = tensors.get("attention_mask")
            if mask is not None and mask.dtype == torch.bool and mask.ndim == 2:
                tensors["attention_mask"] = mask.to(torch.int64)  # as tokenizers give it
            result = self._engine.forward(
                call.session,
                call.trunk_epoch,
                key,
                call.version,
                mode,
                tensors,
                received.digest,
                deadline,
                call.acknowledged,
                call.use_cache if call.HasField("use_cache") else None,
                cache_from_proto(call.cache, rows) if cached else None,
                list(call.released_caches),
            )
            return self._reply("trunk_output", result, call.session, received)

        def waiting() -> Outgoing:
            with WaitingPlace(self._waiting, self._max_waiting):
                return work()

        yield from answered(context, "Forward", waiting).frames()

    def _backward(self, requests: Iterator[bytes], context: Context) -> Iterator[bytes]:
        def work() -> Outgoing:
            deadline = deadline_of(context)
            incoming = Incoming(requests)
            call = incoming.header.backward
            expect(incoming, "backward")
            self._tokens.check(context, call.session, call.trunk_epoch)
            received = self._receive(incoming, digest=True)
            grad = received.tensors.get("trunk_output_grad")
            if grad is None:
                raise CodecError("a backward must carry the tensor 'trunk_output_grad'.")
            for name, value in (
                ("num_tokens", call.num_tokens),
                ("loss_denominator", call.loss_denominator),
            ):
                if not (math.isfinite(value) and value >= 0):
                    raise CodecError(f"{name} must be finite and not negative; it is {value}.")
            counts = struct.pack("<dd?", call.num_tokens, call.loss_denominator, call.last)
            result = self._engine.backward(
                call.session,
                call.trunk_epoch,
                key_from_proto(call.key),
                call.version,
                grad,
                call.num_tokens,
                call.loss_denominator,
                call.last,
                hashlib.sha256(received.digest + counts).digest(),
                deadline,
            )
            return self._reply("smashed_grad", result, call.session, received)

        yield from answered(context, "Backward", work).frames()

    # ------------------------------------------------------------------ pieces

    def _receive(self, incoming: Incoming, *, digest: bool) -> Received:
        allocate: Allocate = (
            pinned if torch.cuda.is_initialized() else pooled  # type: ignore[no-untyped-call]
        )
        return incoming.receive(self._max_tensor_bytes, allocate=allocate, digest=digest)

    def _reply(self, name: str, result: CallResult, session: str, received: Received) -> Outgoing:
        header = pb.ReplyHeader(
            version=result.version,
            compute_seconds=result.compute_seconds,
            queue_seconds=result.queue_seconds,
        )
        tensor: Tensor = to_host(result.tensor)
        reply = Outgoing(pb.Header(reply=header), {name: tensor})
        self._engine.count_bytes(session, received.num_bytes, reply.num_bytes)
        return reply
