"""Mutual TLS after the handshake: whose certificate a call came with, and what it may do.

The TLS library has checked that the certificate is signed by the CA and was valid when the connection
began. What is left is checked with every call: that it is valid still, that its subject is on the list
of its role, and that a client's token comes with the certificate that used it first.
"""

import datetime
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtensionOID, NameOID

from flower_split.errors import ConfigError, RefusalReason, TrunkRefused
from flower_split.runtime.certificate_files import changed_at
from flower_split.runtime.secret_files import check_not_written_by_others

logger = logging.getLogger(__name__)

UNKNOWN_TOKEN = (
    'the trunk takes calls with the metadata "authorization: Bearer <token>" and a token that it knows '
    "now. A client's is of one round, from the strategy's message; the coordinator's is in the trunk's "
    "token file (trunk.token-file)."
)
"""What a caller is told whose token is not known, or is not its own: the same words."""

_MAX_SUBJECTS = 256  # whose certificates are kept parsed


@dataclass(frozen=True, kw_only=True, slots=True)
class MutualTls:
    """Who may call a trunk that asks for certificates."""

    client_ca: str  # PEM file
    clients: tuple[str, ...] = ()  # subjects, or @FILE with one a line; none: whoever the CA signed
    coordinators: tuple[str, ...] = ()  # the same, of calls with the coordinator's token


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a certificate is for."""

    name: str  # its common name; without one, the first alternative name
    names: frozenset[str]  # common name and alternative names
    begins: datetime.datetime
    ends: datetime.datetime

    @classmethod
    def of(cls, pem: bytes) -> "Subject":
        """Return the subject of a certificate that the TLS library has verified."""
        leaf = x509.load_pem_x509_certificate(pem)
        common = [
            str(item.value) for item in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
        names = [*common, *_alternative_names(leaf)]
        return cls(
            names[0] if names else leaf.subject.rfc4514_string(),
            # One without a name is itself alone, or all such would be one caller.
            frozenset(names) or frozenset({leaf.fingerprint(hashes.SHA256()).hex()}),
            leaf.not_valid_before_utc,
            leaf.not_valid_after_utc,
        )


def common_name(context: grpc.ServicerContext) -> str:
    """Return the common name of the certificate that a call came with; empty: none."""
    name = _told_by_tls(context, "x509_common_name")
    return "" if name is None else name.decode(errors="replace")


def _told_by_tls(context: grpc.ServicerContext, name: str) -> bytes | None:
    """Return the first value of a property of the connection, as gRPC's TLS tells it."""
    told = cast("Mapping[str, Sequence[bytes]]", context.auth_context())  # its types say less
    return next(iter(told.get(name, ())), None)


def _alternative_names(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except x509.ExtensionNotFound:
        return []
    if not isinstance(found, x509.SubjectAlternativeName):
        return []
    kinds = (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name, x509.IPAddress)
    return [str(item.value) for item in found if isinstance(item, kinds)]


class AllowList:
    """Subjects that may call, from the command line and from files that are read again when changed.

    Args:
        option: The option of the command line, for messages.
        entries: Subjects, or ``@FILE``; none: everybody.

    Raises:
        ConfigError: A file cannot be read, or others can write it.
    """

    def __init__(self, option: str, entries: Sequence[str]) -> None:
        self.option = option
        self._everybody = not entries
        self._given = frozenset(entry for entry in entries if not entry.startswith("@"))
        self._files = tuple(Path(entry[1:]).expanduser() for entry in entries if entry[:1] == "@")
        self._lock = threading.Lock()
        self._problem = ""  # with the files, as it was said last
        self._times = self._looked()
        self._listed = self._read()

    def admits(self, subject: Subject) -> bool:
        """Return whether a subject is on the list as it is now."""
        if self._everybody:
            return True
        with self._lock:
            try:
                times = self._looked()
                if times != self._times:
                    self._listed = self._read()
                    self._times, self._problem = times, ""
                    logger.info("%s was read again: %d subjects", self.option, len(self._listed))
            except ConfigError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    logger.error("the former subjects of %s stay in force: %s", self.option, error)
            return not self._listed.isdisjoint(subject.names)

    def _looked(self) -> tuple[int, ...]:
        try:
            return tuple(map(changed_at, self._files))
        except OSError as error:
            raise ConfigError(
                f"{self.option} @FILE must name a readable file with one subject a line: {error}."
            ) from error

    def _read(self) -> frozenset[str]:
        found = set(self._given)
        for path in self._files:
            check_not_written_by_others(path, self.option)
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{self.option} @{path} cannot be read: {error}.") from error
            found |= {line.strip() for line in lines if line.strip() and line.strip()[0] != "#"}
        return frozenset(found)


class CertificateGate:
    """Checks the certificate of every call. Thread-safe: locks of its own, taken last.

    Args:
        mutual: Who may call.
        knows_token: Whether a token is a participant's now. Needs no lock.

    Raises:
        ConfigError: A file of a list cannot be read.
    """

    def __init__(self, mutual: MutualTls, knows_token: Callable[[str], bool]) -> None:
        self._clients = AllowList("--allow-client", mutual.clients)
        self._coordinators = AllowList("--allow-coordinator", mutual.coordinators)
        self._knows_token = knows_token
        self._lock = threading.Lock()
        self._parsed: OrderedDict[bytes, Subject] = OrderedDict()  # by hash of the PEM
        self._owners: dict[str, frozenset[str]] = {}  # by token: the names it came with first

    def check(self, context: grpc.ServicerContext, token: str, *, coordinator: bool) -> None:
        """Check that a call's certificate may make it.

        Args:
            context: The call's gRPC context.
            token: The call's token, which is known.
            coordinator: Whether it is the coordinator's.

        Raises:
            TrunkRefused: It may not (UNAUTHENTICATED).
        """
        subject = self._subject_of(context)
        now = datetime.datetime.now(datetime.UTC)
        if not subject.begins <= now <= subject.ends:
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                f"the certificate of {subject.name!r} ended at {subject.ends:%Y-%m-%d %H:%M} UTC, while "
                "its connection was open. Renew it; the next connection shows the new one.",
            )
        allowed = self._coordinators if coordinator else self._clients
        if not allowed.admits(subject):
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                f"the certificate of {subject.name!r} is not on the trunk's list of "
                f"{'coordinators' if coordinator else 'clients'}. Add its common name, or an "
                f"alternative name, to {allowed.option} at the trunk.",
            )
        if not coordinator and not self._owns(subject, token):
            raise TrunkRefused(RefusalReason.UNAUTHENTICATED, UNKNOWN_TOKEN)

    def tokens_of(self, name: str) -> list[str]:
        """Return the tokens that came first with a certificate of this name, of rounds that are open."""
        with self._lock:
            return [token for token, names in self._owners.items() if name in names]

    def _owns(self, subject: Subject, token: str) -> bool:
        """Return whether a token is this subject's; the first one to use it gets it."""
        with self._lock:
            owner = self._owners.get(token)
            if owner is None:
                for gone in [other for other in self._owners if not self._knows_token(other)]:
                    del self._owners[gone]
                owner = self._owners[token] = subject.names
        if owner == subject.names:
            return True
        logger.warning(
            "refused: a token that belongs to another certificate came with that of %r",
            subject.name,
        )
        return False

    def _subject_of(self, context: grpc.ServicerContext) -> Subject:
        pem = _told_by_tls(context, "x509_pem_cert")
        if pem is None:  # the TLS library lets nobody pass without one
            raise TrunkRefused(RefusalReason.UNAUTHENTICATED, UNKNOWN_TOKEN)
        name = hashlib.sha256(pem).digest()
        with self._lock:
            subject = self._parsed.get(name)
            if subject is None:
                subject = self._parsed[name] = Subject.of(pem)
                while len(self._parsed) > _MAX_SUBJECTS:
                    self._parsed.popitem(last=False)
        return subject
