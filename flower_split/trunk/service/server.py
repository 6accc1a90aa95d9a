"""The trunk's gRPC server: it listens, and hands every call to the methods of its two callers.

A call is read, checked, handed to the engine and answered; nothing is computed or remembered here
but which token opened which session.

Every call runs on a worker thread of one pool, and some calls wait there for other calls: a forward
for the backwards that complete a window. Calls that may wait therefore get at most three quarters of
the workers; one more is turned away with UNAVAILABLE, which clients try again. So a worker is always
free for the backward that ends the wait, and for the coordinator.

Next: ``flower_split/trunk/service/client_calls.py``, then ``flower_split/trunk/engine/engine.py``.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flower_split.errors import ConfigError
from flower_split.runtime.closing import Closing
from flower_split.runtime.secret_files import TokenFile
from flower_split.runtime.tracing import PROCESS_TRACING
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.experiments import Experiments, OneExperiment
from flower_split.trunk.engine.several_experiments import SeveralExperiments
from flower_split.trunk.service.admission import Admission, CoordinatorTokens
from flower_split.trunk.service.audit_log import AuditLog
from flower_split.trunk.service.call_watch import CallWatch
from flower_split.trunk.service.calls_by_experiment import CallsByExperiment
from flower_split.trunk.service.client_calls import ClientCalls
from flower_split.trunk.service.client_certificates import CertificateGate, MutualTls
from flower_split.trunk.service.coordinator_calls import CoordinatorCalls
from flower_split.trunk.service.following_health import FollowingHealth
from flower_split.trunk.service.foreign_headers import ForeignHeaders
from flower_split.trunk.service.handlers import FirstFrames, Quotas
from flower_split.trunk.service.limits import Limits
from flower_split.trunk.service.refusals import RefusalLog
from flower_split.trunk.service.tls import ServerCertificate
from flower_split.wire.grpc_options import SERVICE, is_loopback, server_options

logger = logging.getLogger(__name__)

MAX_TENSOR_BYTES = 1 << 30
_MIN_WORKERS = 8
_MAX_WORKERS = 1024  # for the clients of several experiments; threads are made when they are needed


class TrunkServer(Closing):
    """Serves engines until it is stopped; they stay the caller's to close.

    Args:
        engine: What computes; or the experiments, each with an engine of its own.
        coordinator_token: Who knows it may begin, commit and abort rounds; of a file, as it is now.
        coordinators: Tokens of further coordinators by name, each with experiments of its own.
        listen: ``host:port``; port 0 takes any free one.
        tls_certificate: PEM file, read again when it is renewed; ``None``: plain text, on loopback.
        tls_key: PEM file.
        mutual: Who may call, by certificate; None: no certificate is asked for.
        max_workers: Threads; at most three quarters of them hold calls that wait.
        max_tensor_bytes: Limit on the tensors of one call.
        max_call_seconds: Longest that a client's call may wait, whatever the client asks for.
        limits: Limits on one session's calls in progress; None: the defaults.
        audit: Where every call is noted; the caller closes it. None: nowhere.
        interceptors: Run around every call that is let in, as grpc's own.

    Attributes:
        refusals: Counts of refused calls.
        health: Answers health checks.

    Raises:
        ConfigError: Plain text beyond loopback, an empty token, half a key pair, a certificate or
            client CA that is not valid, a key of another one, a list of subjects that cannot be read,
            too few workers.
    """

    def __init__(
        self,
        engine: TrunkEngine | SeveralExperiments,
        *,
        coordinator_token: str | TokenFile,
        coordinators: Mapping[str, TokenFile] | None = None,
        listen: str = "127.0.0.1:0",
        tls_certificate: str | None = None,
        tls_key: str | None = None,
        mutual: MutualTls | None = None,
        max_workers: int = 256,
        max_tensor_bytes: int = MAX_TENSOR_BYTES,
        max_call_seconds: float = 3600.0,
        limits: Limits | None = None,
        audit: AuditLog | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
    ) -> None:
        credential = CoordinatorTokens(coordinator_token, coordinators or {})
        if max_workers < _MIN_WORKERS:
            raise ConfigError(f"the trunk needs {_MIN_WORKERS} workers; it has {max_workers}.")
        experiments: Experiments = (
            engine if isinstance(engine, SeveralExperiments) else OneExperiment(engine)
        )
        workers = min(max_workers * experiments.maximum, max(max_workers, _MAX_WORKERS))
        self._listen = listen
        self._tls = _certificate_of(listen, tls_certificate, tls_key, mutual)
        self.health = FollowingHealth(lambda: experiments.queue_seconds, max_call_seconds)
        limits = limits or Limits()
        self._foreign_headers = ForeignHeaders()
        refusals = self.refusals = RefusalLog(audit=audit, participant=limits.refusals)
        # Twice as many as workers: one that was given up reads until its peer has been told.
        first_frames = self._first_frames = FirstFrames(limits.first_frame_seconds, 2 * workers)

        full: set[str] = set()  # tokens are of one experiment each

        def calls_of(engine: TrunkEngine) -> ClientCalls:
            waiting = workers * 3 // 4 // experiments.maximum  # an equal share each
            quotas = Quotas(waiting, limits, max_call_seconds)
            quotas.full = full
            limited = max_tensor_bytes, max_call_seconds
            return ClientCalls(engine, quotas, *limited, refusals, first_frames)

        clients = CallsByExperiment(experiments, calls_of, refusals)
        refusals.experiment_of = clients.experiment_of
        knows, quotas_of = experiments.knows_token, clients.quotas_of
        gate = self._gate = CertificateGate(mutual, knows) if mutual else None
        self._watches = [CallWatch(clients.look)]
        if isinstance(experiments, SeveralExperiments):
            self._watches.append(CallWatch(experiments.expire, "trunk-leases"))
        admission = Admission(credential, knows, refusals, first_frames, full, quotas_of, gate)
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="trunk-rpc"),
            options=server_options(limits.connections, limits.stream_window),
            interceptors=[admission, *_traced(), *interceptors],
        )
        coordinating = CoordinatorCalls(experiments, credential, refusals, first_frames, gate)
        handlers = clients.handlers() | coordinating.handlers()
        methods = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((methods,))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)

    def start(self) -> int:
        """Listen and serve; return the port.

        Raises:
            ConfigError: The address cannot be bound.
        """
        try:
            if self._tls:
                port = self._server.add_secure_port(self._listen, self._tls.credentials())
            else:
                port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ConfigError(
                f"the trunk cannot listen on {self._listen!r}: {error}. Is the port taken?"
            ) from error
        self._foreign_headers.begin()
        self._server.start()
        for watch in self._watches:
            watch.start()
        for service in ("", SERVICE):
            self.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        how = "plain text" if self._tls is None else "TLS" if self._gate is None else "mutual TLS"
        logger.info("trunk serves on port %d (%s)", port, how)
        return port

    def stop(self, grace: float = 2.0) -> None:
        """Turn new calls away, give those in progress ``grace`` seconds, then cancel them.

        A cancelled call's thread ends when the engine lets go of it: close the engine afterwards.
        """
        self.health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        for watch in self._watches:
            watch.close()
        self._first_frames.close()
        self.refusals.pace.close()
        self._foreign_headers.end()

    def close(self) -> None:
        """Stop without grace."""
        self.stop(0.0)


def _traced() -> list[grpc.ServerInterceptor]:
    """Return what puts calls into spans; nothing, and nothing is imported, where there are no traces."""
    if PROCESS_TRACING.current is None:
        return []
    from flower_split.trunk.service.traced_calls import TracedCalls

    return [TracedCalls(PROCESS_TRACING.current)]


def _certificate_of(
    listen: str, certificate: str | None, key: str | None, mutual: MutualTls | None
) -> ServerCertificate | None:
    """Return what the port serves with; None: plain text.

    Raises:
        ConfigError: Plain text beyond loopback or with client certificates, half a pair, or a file that
            cannot be used.
    """
    if bool(certificate) != bool(key):
        raise ConfigError("TLS needs both a certificate and its key; only one is given.")
    if mutual is not None and not certificate:
        raise ConfigError(
            "--client-ca asks for clients' certificates, which takes TLS: give --tls-certificate and "
            "--tls-key."
        )
    if certificate and key:
        return ServerCertificate(certificate, key, mutual.client_ca if mutual else "")
    if not is_loopback(listen):
        raise ConfigError(
            f"the trunk may listen without TLS on loopback only, not on {listen!r}: tokens and "
            "activations would travel in the clear. Give --tls-certificate and --tls-key, or listen "
            "on 127.0.0.1."
        )
    return None
