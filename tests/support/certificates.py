"""Certificates for tests: a CA in a folder, and what it signs, with dates as a test wants them."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flower_split.wire.client_certificate import ClientCertificate

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """A CA in a folder of its own."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def made(cls, folder: Path) -> "Authority":
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        builder = begun(name, name, key, -9 * DAY, 9 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        found = cls(folder, builder.sign(key, hashes.SHA256()), key)
        (folder / "ca.pem").write_bytes(pem(found.certificate))
        return found

    @property
    def root(self) -> str:
        return str(self.folder / "ca.pem")

    def sign(
        self,
        host: str = "127.0.0.1",
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
        name: str = "trunk",
        names: Sequence[str] = (),
    ) -> tuple[str, str]:
        """The paths of a certificate for ``host``, and DNS names beside it, and its key."""
        address = x509.IPAddress(ipaddress.ip_address(host))
        return self._sign([address, *map(x509.DNSName, names)], begins, ends, name)

    def client(
        self,
        name: str,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
    ) -> ClientCertificate:
        """A client's certificate, as files."""
        return ClientCertificate(*self._sign([x509.DNSName(name)], begins, ends, name))

    def _sign(
        self,
        alternatives: Sequence[x509.GeneralName],
        begins: datetime.timedelta,
        ends: datetime.timedelta,
        name: str,
    ) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = begun(subject, self.certificate.subject, key, begins, ends)
        names = x509.SubjectAlternativeName(alternatives)
        signed = builder.add_extension(names, False).sign(self.key, hashes.SHA256())
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        files[0].write_bytes(pem(signed))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        files[1].chmod(0o600)
        return str(files[0]), str(files[1])


def begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: datetime.timedelta,
    ends: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def renew(files: tuple[str, ...]) -> None:
    """Let the files be newer than they were, whatever the resolution of their times."""
    for path in files:
        later = os.stat(path).st_mtime_ns + 2_000_000_000
        os.utime(path, ns=(later, later))
