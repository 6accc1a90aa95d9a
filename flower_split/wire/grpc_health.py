"""gRPC's standard health check of a trunk, which needs no credential."""

from contextlib import closing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import TrunkError, TrunkUnavailable
from flower_split.wire.certificate_errors import certificate_fault
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_options import is_loopback, open_channel
from flower_split.wire.grpc_status import failed_call
from flower_split.wire.proxies import proxy_to
from flower_split.wire.tls_errors import tls_fault


def health_of(
    address: str,
    root_certificates: str = "",
    timeout: float = 5.0,
    certificate: ClientCertificate = NO_CERTIFICATE,
    proxy: str = ENVIRONMENT,
) -> str:
    """Return what a trunk says of itself: SERVING or NOT_SERVING.

    Args:
        address: ``host:port``.
        root_certificates: CA for TLS, as PEM text or a PEM file's path; empty: plain text, loopback.
        timeout: Seconds.
        certificate: What this side shows over TLS.
        proxy: As ``trunk.proxy`` says.

    Raises:
        TrunkUnavailable: It does not answer.
        TrunkError: The TLS handshake failed; says why.
        ConfigError: Plain text to another machine, or a PEM file that cannot be read.
    """
    with closing(open_channel(address, root_certificates, certificate, proxy)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.RpcError as error:
            text = failed_call(error).details()
            fault = tls_fault(text)
            if not fault and root_certificates:
                way = "" if is_loopback(address) else proxy_to(address, proxy)
                fault = certificate_fault(text, address, certificate, way)
            if fault:
                raise TrunkError(f"the trunk at {address}: no connection, for {fault}.") from error
            raise TrunkUnavailable(
                f"the trunk at {address} does not answer a health check within {timeout:g} s. Look "
                "whether it runs there, and, with TLS, whether its certificate is for that name."
            ) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
