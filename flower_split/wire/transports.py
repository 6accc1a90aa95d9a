"""Transports by name: those built in, and those of installed distributions."""

from types import MappingProxyType
from typing import Protocol, TypeGuard

from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import ConfigError
from flower_split.runtime.registry import Registry
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_transport import TrunkChannel
from flower_split.wire.possession import ClientKey
from flower_split.wire.shared_memory_transport import AutomaticChannel, SharedMemoryChannel
from flower_split.wire.transport import Transport


class MakesTransport(Protocol):
    """Makes a client's way to one trunk: a class of transports, or a function."""

    def __call__(
        self,
        address: str,
        *,
        token: str,
        timeout: float,
        key: ClientKey | None = None,
        root_certificates: str = "",
        certificate: ClientCertificate = NO_CERTIFICATE,
        proxy: str = ENVIRONMENT,
    ) -> Transport:
        """Return a transport; connections are made with the first call.

        Args:
            address: ``host:port``.
            token: The client's, sent with every call.
            timeout: Seconds that one call may take, retries included.
            key: With which every call proves that the token is its own; None: the token needs no
                proof.
            root_certificates: CA for TLS, as PEM text or a PEM file's path; empty: plain text.
            certificate: What this side shows over TLS.
            proxy: As ``trunk.proxy`` says.

        Raises:
            ConfigError: Plain text to another machine, or a PEM file that cannot be read.
        """


BUILT_IN: MappingProxyType[str, MakesTransport] = MappingProxyType(
    {"auto": AutomaticChannel, "grpc": TrunkChannel, "shared-memory": SharedMemoryChannel}
)


def _makes_transport(found: object) -> TypeGuard[MakesTransport]:
    return callable(found)


TRANSPORTS: Registry[MakesTransport] = Registry(
    group="flower_split.transports",
    key="trunk.transport",
    form="a class of transports (flower_split.wire.transport.Transport), or what makes one",
    machines="the clients run",
    built_in=BUILT_IN,
    accepts=_makes_transport,
    error=ConfigError,
)
