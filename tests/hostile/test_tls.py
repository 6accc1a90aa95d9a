"""TLS that fails says why at once; a renewed certificate is used without a restart."""

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flower_split.errors import ConfigError, TrunkError, TrunkUnavailable
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.tls_errors import tls_fault
from tests.support.certificates import DAY, Authority, renew
from tests.support.loopback import FakeEngine, remote, served


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
