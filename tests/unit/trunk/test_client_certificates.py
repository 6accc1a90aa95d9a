"""Whom a certificate names: what a token belongs to, and what a list is compared with."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flower_split.trunk.service.client_certificates import Subject


def certificate(*attributes: x509.NameAttribute[str]) -> bytes:
    """Return a certificate of a new key with this subject, as PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name(attributes)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_renewed_certificate_is_the_same_caller() -> None:
    name = x509.NameAttribute(NameOID.COMMON_NAME, "north")
    assert Subject.of(certificate(name)).names == Subject.of(certificate(name)).names == {"north"}


@pytest.mark.parametrize("attributes", [(), (x509.NameAttribute(NameOID.ORGANIZATION_NAME, "H"),)])
def test_two_certificates_without_a_name_are_two_callers(
    attributes: tuple[x509.NameAttribute[str], ...],
) -> None:
    first, second = (Subject.of(certificate(*attributes)) for _ in range(2))
    assert first.names and first.names != second.names
