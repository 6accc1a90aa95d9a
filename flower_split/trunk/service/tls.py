"""The trunk's certificate, key and client CA: checked before it listens, read again when renewed."""

import logging
import threading

import grpc

from flower_split.errors import ConfigError
from flower_split.runtime.certificate_files import (
    Pair,
    PairNames,
    changed_at,
    read_authorities,
    read_pair,
)

logger = logging.getLogger(__name__)

_NAMES = PairNames("--tls-certificate", "--tls-key")


class ServerCertificate:
    """A certificate and its key, and the CA that clients' certificates must be signed by: PEM files.

    Every handshake looks at the files' times, so that renewed ones are used from the next connection
    on, without a restart. What does not fit is left alone, and said once.

    Args:
        certificate: PEM file, of the certificate and, after it, of the CAs between it and the root.
        key: PEM file.
        client_ca: PEM file; every client must then show a certificate. Empty: none is asked for.

    Raises:
        ConfigError: A file cannot be read, others can read the key, the two do not belong together,
            or the certificate or the CA is not valid now.
    """

    def __init__(self, certificate: str, key: str, client_ca: str = "") -> None:
        self._files = (certificate, key)
        self._client_ca = client_ca
        self._lock = threading.Lock()  # handshakes come on any thread
        self._times = self._looked()
        self._content = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port serves with."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(*self._content),
            self._renewed,
            require_client_authentication=bool(self._client_ca),
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration:
        """Return the files for the handshake that begins: the former, or what they were renewed to."""
        with self._lock:
            try:
                times = self._looked()
                if times != self._times:
                    self._times = times
                    self._content = self._read()
                    logger.info("the certificate %s was renewed and is used", self._files[0])
            except ConfigError as error:
                logger.error("the renewed certificate is not used: %s", error)
            return _configuration(*self._content)

    def _looked(self) -> tuple[int, ...]:
        """Return the times of the last change to each file."""
        named = (*self._files, self._client_ca) if self._client_ca else self._files
        try:
            return tuple(map(changed_at, named))
        except OSError as error:
            raise ConfigError(
                "--tls-certificate, --tls-key and --client-ca must name readable PEM files: "
                f"{error}."
            ) from error

    def _read(self) -> tuple[Pair, bytes | None]:
        pair = read_pair(*self._files, _NAMES)
        authorities = read_authorities("--client-ca", self._client_ca) if self._client_ca else None
        return pair, authorities


def _configuration(pair: Pair, authorities: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], authorities)
