"""TLS that fails says why at once; a renewed certificate is used without a restart."""

import datetime
import ipaddress
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flower_split.errors import ConfigError, TrunkError, TrunkUnavailable
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.tls_errors import tls_fault
from tests.support.loopback import FakeEngine, remote, served

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
    ) -> tuple[str, str]:
        """The paths of a certificate for ``host`` and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = begun(subject, self.certificate.subject, key, begins, ends)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
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


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority.made(tmp_path / "good")


@contextmanager
def trunk(certificate: str, key: str) -> Iterator[int]:
    with served(FakeEngine(), tls_certificate=certificate, tls_key=key) as port:
        yield port


def failure(port: int, root: str) -> str:
    """What the client is told, and that it was told at once: its timeout is 20 s."""
    started = time.monotonic()
    with remote(port, root_certificates=root) as client, pytest.raises(TrunkError) as caught:
        client.open(1)
    assert time.monotonic() - started < 10
    assert not isinstance(caught.value, TrunkUnavailable)
    return str(caught.value)


def test_client_with_the_right_ca_is_served(ca: Authority) -> None:
    with trunk(*ca.sign()) as port, remote(port, root_certificates=ca.root) as client:
        assert client.open(1).session


def test_wrong_ca_is_told_at_once_with_the_remedy(ca: Authority, tmp_path: Path) -> None:
    other = Authority.made(tmp_path / "other")
    with trunk(*ca.sign()) as port:
        assert "not signed by the CA in trunk.root-certificates" in failure(port, other.root)


def test_wrong_host_is_told_at_once_with_the_remedy(ca: Authority) -> None:
    with trunk(*ca.sign(host="127.0.0.9")) as port:
        assert "not for the host in trunk.address" in failure(port, ca.root)


def test_plain_text_where_tls_is_expected_is_told_at_once(ca: Authority) -> None:
    with served(FakeEngine()) as port:
        assert "speaks plain text, and this side TLS" in failure(port, ca.root)


def test_certificate_that_expires_while_the_trunk_runs_is_told_at_once(ca: Authority) -> None:
    soon = datetime.timedelta(seconds=3)  # X.509 counts whole ones
    with trunk(*ca.sign(ends=soon)) as port:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                with remote(port, root_certificates=ca.root) as client:
                    client.open(1)
            except TrunkError as error:
                assert not isinstance(error, TrunkUnavailable) and "has expired" in str(error)
                return
    pytest.fail("the certificate never expired")


def test_faults_are_told_from_trunks_that_are_away() -> None:
    gone = "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Connection refused"
    assert tls_fault(gone) == tls_fault(None) == ""
    early = "CERTIFICATE_VERIFY_FAILED: certificate is not yet valid: OK"
    assert "clock" in tls_fault(early) and "not accepted" not in tls_fault(early)


@pytest.mark.parametrize(
    ("begins", "ends"), [(-2 * DAY, -DAY), (DAY, 2 * DAY)], ids=["expired", "not-yet-valid"]
)
def test_certificate_that_is_not_valid_now_is_not_served_with(
    ca: Authority, begins: datetime.timedelta, ends: datetime.timedelta
) -> None:
    certificate, key = ca.sign(begins=begins, ends=ends)
    with pytest.raises(ConfigError, match=f"{certificate} is valid from .* Renew it"):
        TrunkServer(FakeEngine(), coordinator_token="t", tls_certificate=certificate, tls_key=key)


def test_key_of_another_certificate_is_told_by_both_names(ca: Authority) -> None:
    certificate, _ = ca.sign(name="one")
    _, key = ca.sign(name="two")
    with pytest.raises(ConfigError, match=f"{key} does not belong to .*{certificate}"):
        TrunkServer(FakeEngine(), coordinator_token="t", tls_certificate=certificate, tls_key=key)


def renew(files: tuple[str, str]) -> None:
    """Let the files be newer than they were, whatever the resolution of their times."""
    for path in files:
        later = os.stat(path).st_mtime_ns + 2_000_000_000
        os.utime(path, ns=(later, later))


def test_renewed_certificate_is_used_without_a_restart(ca: Authority, tmp_path: Path) -> None:
    other = Authority.made(tmp_path / "other")
    files = ca.sign()
    with trunk(*files) as port:
        with remote(port, root_certificates=ca.root) as before:
            before.open(1)
            for target, source in zip(files, other.sign(), strict=True):
                Path(target).write_bytes(Path(source).read_bytes())
            renew(files)
            with remote(port, root_certificates=other.root) as after:
                assert after.open(1).session
            assert "not signed by the CA" in failure(port, ca.root)


def test_renewal_that_does_not_fit_leaves_the_former_certificate(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = ca.sign()
    with trunk(*files) as port:
        Path(files[0]).write_bytes(Path(ca.sign(name="another")[0]).read_bytes())
        renew(files)
        with remote(port, root_certificates=ca.root) as client:
            assert client.open(1).session
    assert any("does not belong to" in record.getMessage() for record in caplog.records)
