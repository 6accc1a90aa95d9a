"""The trunk's certificate and key: checked before it listens, and read again when they are renewed."""

import datetime
import logging
import os
import threading

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from flower_split.errors import ConfigError
from flower_split.runtime.secret_files import check_private
from flower_split.wire.grpc_options import read_pem

logger = logging.getLogger(__name__)

_Times = tuple[int, int]  # of the last change to certificate and key, in nanoseconds


class ServerCertificate:
    """A certificate and its key, in two PEM files.

    Every handshake looks at the files' times, so that a renewed pair is used from the next
    connection on, without a restart. A pair that does not fit is left alone, and said once.

    Args:
        certificate: PEM file, of the certificate and, after it, of the CAs between it and the root.
        key: PEM file.

    Raises:
        ConfigError: A file cannot be read, others can read the key, the two do not belong together,
            or the certificate is not valid now.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._files = (certificate, key)
        self._lock = threading.Lock()  # handshakes come on any thread
        self._times = self._looked()
        self._pair = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port serves with."""
        return grpc.dynamic_ssl_server_credentials(_configuration(self._pair), self._renewed)

    def _renewed(self) -> grpc.ServerCertificateConfiguration:
        """Return the pair for the handshake that begins: the former one, or what it was renewed to."""
        with self._lock:
            try:
                times = self._looked()
                if times != self._times:
                    self._times = times
                    self._pair = self._read()
                    logger.info("the certificate %s was renewed and is used", self._files[0])
            except ConfigError as error:
                logger.error("the renewed certificate is not used: %s", error)
            return _configuration(self._pair)

    def _looked(self) -> _Times:
        certificate, key = self._files
        try:
            return os.stat(certificate).st_mtime_ns, os.stat(key).st_mtime_ns
        except OSError as error:
            raise ConfigError(
                f"--tls-certificate and --tls-key must name readable PEM files: {error}."
            ) from error

    def _read(self) -> tuple[bytes, bytes]:
        certificate, key = self._files
        check_private(key, "tls-key")
        pair = read_pem("tls-key", key), read_pem("tls-certificate", certificate)
        try:
            private = serialization.load_pem_private_key(pair[0], password=None)
            leaf = x509.load_pem_x509_certificates(pair[1])[0]
        except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
            raise ConfigError(
                f"--tls-certificate {certificate} and --tls-key {key} must be PEM files, the key without "
                f"a password: {error}."
            ) from error
        if private.public_key() != leaf.public_key():
            raise ConfigError(
                f"--tls-key {key} does not belong to --tls-certificate {certificate}: give the key that "
                "the certificate was made for."
            )
        now = datetime.datetime.now(datetime.UTC)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            raise ConfigError(
                f"--tls-certificate {certificate} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} "
                f"to {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now is not in between. Renew it, "
                "or set this machine's clock."
            )
        return pair


def _configuration(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([pair])
