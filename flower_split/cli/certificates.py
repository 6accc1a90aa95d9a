"""X.509 certificates and keys as values: a CA, and what it signs. Files are ``certs``' affair."""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CLOCKS = datetime.timedelta(hours=1)  # that machines' clocks may be behind this one's


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: its certificate, and the key that signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def ends(self, days: int) -> datetime.datetime:
        """Return when a certificate that it signs now for so many days ends: not after its own."""
        wanted = _now() + datetime.timedelta(days=days)
        return min(wanted, self.certificate.not_valid_after_utc)


def new_authority(days: int) -> Authority:
    """Make a CA that signs leaves only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("flower-split development CA")
    builder = _begun(name, name, key.public_key(), _now() + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def signed_server(
    authority: Authority, hosts: Sequence[str], days: int
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Make a server's certificate for these DNS names and addresses, and its key."""
    names = [_host(host) for host in dict.fromkeys(hosts)]
    extension = x509.SubjectAlternativeName(names)
    return _signed(authority, hosts[-1], days, ExtendedKeyUsageOID.SERVER_AUTH, extension)


def signed_client(
    authority: Authority, name: str, days: int
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Make a client's certificate for its name, and its key."""
    extension = x509.SubjectAlternativeName([x509.DNSName(name)])
    return _signed(authority, name, days, ExtendedKeyUsageOID.CLIENT_AUTH, extension)


def node_key() -> tuple[bytes, bytes]:
    """Make the key pair by which Flower's SuperLink knows a SuperNode: private and public file."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def public_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, in the clear."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _signed(
    authority: Authority,
    name: str,
    days: int,
    purpose: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate.subject
    builder = _begun(_name(name), issuer, key.public_key(), authority.ends(days))
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(signer, critical=False)
    )
    return builder.sign(authority.key, hashes.SHA256()), key


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer)
    builder = builder.public_key(key).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(_now() - _CLOCKS).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
