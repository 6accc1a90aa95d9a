"""Certificates in PEM files: read, and checked before anything is said with them."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from flower_split.errors import ConfigError
from flower_split.runtime.secret_files import check_private


@dataclass(frozen=True, slots=True)
class PairNames:
    """What a command or the configuration calls the two files of a pair."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate, with the CAs between it and the root after it, and its key; both PEM."""

    certificate: bytes
    key: bytes


def read_pem(key: str, path: str) -> bytes:
    """Return the content of a PEM file.

    Raises:
        ConfigError: It cannot be read, or is not PEM.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} must name a readable PEM file; {path!r}: {error}.") from error
    if b"-----BEGIN" not in content:
        raise ConfigError(f"{key} must name a PEM file; {path!r} holds no PEM block.")
    return content


def read_pair(certificate: str, key: str, names: PairNames) -> Pair:
    """Return a certificate and its key.

    Args:
        certificate: PEM file.
        key: PEM file.
        names: The two settings' names, for the message.

    Raises:
        ConfigError: A file cannot be read, others can read the key, the two do not belong together,
            or the certificate is not valid now.
    """
    check_private(key, names.key.removeprefix("--"))
    pair = Pair(read_pem(names.certificate, certificate), read_pem(names.key, key))
    try:
        private = serialization.load_pem_private_key(pair.key, password=None)
        leaf = x509.load_pem_x509_certificates(pair.certificate)[0]
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise ConfigError(
            f"{names.certificate} {certificate} and {names.key} {key} must be PEM files, the key without "
            f"a password: {error}."
        ) from error
    if private.public_key() != leaf.public_key():
        raise ConfigError(
            f"{names.key} {key} does not belong to {names.certificate} {certificate}: give the key that "
            "the certificate was made for."
        )
    if not is_valid_now(leaf):
        raise ConfigError(
            f"{names.certificate} {certificate} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} "
            f"to {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now is not in between. Renew it, "
            "or set this machine's clock."
        )
    return pair


def read_authorities(key: str, path: str) -> bytes:
    """Return the PEM text of one CA or several.

    Raises:
        ConfigError: The file cannot be read, holds something else, or none of them is valid now.
    """
    content = read_pem(key, path)
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{key} {path} must hold certificates as PEM: {error}.") from error
    if not any(is_valid_now(certificate) for certificate in found):
        raise ConfigError(
            f"{key} {path} holds no CA that is valid now. Renew it, or set this machine's clock."
        )
    return content


def is_valid_now(certificate: x509.Certificate) -> bool:
    """Return whether this machine's clock is within a certificate's dates."""
    now = datetime.datetime.now(datetime.UTC)
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def changed_at(path: str | Path) -> int:
    """Return when a file was last changed, in nanoseconds.

    Raises:
        OSError: It is not there, or cannot be looked at.
    """
    return os.stat(path).st_mtime_ns
