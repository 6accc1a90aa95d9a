"""Health checks on a loopback port of their own, in plain text, beside a port that asks for certificates.

With ``--client-ca`` nobody makes a call without a certificate, a container's probe neither. The probe runs
on the trunk's own machine, or in its container, and learns one word.
"""

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from flower_split.errors import ConfigError
from flower_split.runtime.closing import Closing
from flower_split.wire.grpc_options import is_loopback, server_options

_CONNECTIONS = 16
_CHECKS = 4  # at once; one more is refused


class HealthPort(Closing):
    """Serves the trunk's health, and nothing else, until it is closed.

    Args:
        listen: ``host:port`` on loopback; port 0 takes any free one.
        servicer: Answers.

    Attributes:
        port: Where it listens.

    Raises:
        ConfigError: It is not on loopback, or cannot be bound.
    """

    def __init__(self, listen: str, servicer: HealthServicer) -> None:
        if not is_loopback(listen):
            raise ConfigError(
                f"--health-listen answers without TLS, on loopback only, not on {listen!r}. Listen on "
                "127.0.0.1, and let the probe run on this machine or in its container."
            )
        self._server = grpc.server(
            ThreadPoolExecutor(_CHECKS, thread_name_prefix="trunk-health"),
            options=server_options(_CONNECTIONS),
            maximum_concurrent_rpcs=_CHECKS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise ConfigError(
                f"--health-listen {listen!r} cannot be served: {error}. Give HOST:PORT with a free port."
            ) from error
        self._server.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.stop(None).wait()
