"""A trunk with ``--client-ca``: who calls shows a certificate, and a token is its first user's."""

import datetime
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.errors import (
    ConfigError,
    RefusalReason,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.service.audit_log import AuditLog
from flower_split.trunk.service.client_certificates import MutualTls
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.grpc_health import health_of
from tests.support.certificates import DAY, Authority, renew
from tests.support.loopback import (
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("authorities") / "good")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("authorities") / "other")


@contextmanager
def mutual(ca: Authority, engine: object | None = None, **options: object) -> Iterator[int]:
    """The port of a trunk that asks for certificates of ``ca``, with lists of subjects."""
    lists = {key: options.pop(key) for key in ("clients", "coordinators") if key in options}
    client_ca = str(options.pop("client_ca", ca.root))
    certificate, key = ca.sign()
    options |= {"tls_certificate": certificate, "tls_key": key}
    with served(
        engine or FakeEngine(), mutual=MutualTls(client_ca=client_ca, **lists), **options
    ) as port:
        yield port


def client(ca: Authority, port: int, shown: ClientCertificate, **changes: object) -> RemoteTrunk:
    return remote(port, root_certificates=ca.root, certificate=shown, **changes)


def leader(ca: Authority, port: int, shown: ClientCertificate) -> closing[TrunkCoordinator]:
    return coordinator(port, root_certificates=ca.root, certificate=shown)


def failure(ca: Authority, port: int, shown: ClientCertificate) -> str:
    """What a client is told, and that it was told at once: its timeout is 20 s."""
    started = time.monotonic()
    with client(ca, port, shown) as one, pytest.raises(TrunkError) as caught:
        one.open(1)
    assert time.monotonic() - started < 10
    assert not isinstance(caught.value, TrunkUnavailable)
    return str(caught.value)


def test_client_and_coordinator_with_certificates_are_served(ca: Authority) -> None:
    with mutual(ca, make_engine(TinyTrunk())) as port:
        with leader(ca, port, ca.client("server-app")) as link:
            link.begin_round(plan())
            with client(ca, port, ca.client("alice")) as alice:
                assert alice.open(1).slot == 0


def test_no_certificate_is_told_at_once_with_the_remedy(ca: Authority) -> None:
    engine = FakeEngine()
    with mutual(ca, engine) as port:
        text = failure(ca, port, NO_CERTIFICATE)
    assert "asks for a client certificate" in text and "trunk.client-certificate" in text
    assert not engine.calls


def test_certificate_of_another_ca_is_told_at_once_with_the_remedy(
    ca: Authority, other: Authority
) -> None:
    engine = FakeEngine()
    with mutual(ca, engine) as port:
        text = failure(ca, port, other.client("alice"))
    assert "not signed by the CA in --client-ca there" in text
    assert not engine.calls


@pytest.mark.parametrize(
    ("begins", "ends"), [(-2 * DAY, -DAY), (DAY, 2 * DAY)], ids=["expired", "not-yet-valid"]
)
def test_certificate_that_is_not_valid_now_is_not_shown(
    ca: Authority, begins: datetime.timedelta, ends: datetime.timedelta
) -> None:
    shown = ca.client("late", begins, ends)
    with pytest.raises(
        ConfigError, match=r"trunk\.client-certificate .* is valid from .* Renew it"
    ):
        client(ca, 1, shown)


def test_subject_that_is_not_listed_is_told_which_list(ca: Authority) -> None:
    engine = FakeEngine()
    with mutual(ca, engine, clients=("alice",), coordinators=("server-app",)) as port:
        with client(ca, port, ca.client("bob")) as bob, pytest.raises(TrunkRefused) as refused:
            bob.open(1)
        assert refused.value.reason is RefusalReason.UNAUTHENTICATED
        assert "'bob' is not on" in str(refused.value) and "--allow-client" in str(refused.value)
        with leader(ca, port, ca.client("alice")) as link, pytest.raises(TrunkRefused) as refused:
            link.status()
        assert "--allow-coordinator" in str(refused.value)
        assert not engine.calls
        with client(ca, port, ca.client("alice")) as alice:
            assert alice.open(1).session
        with leader(ca, port, ca.client("server-app")) as link:
            assert link.status().version == 10


def test_lists_are_read_again_when_they_change(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "clients"
    file.write_text("# the clinics\nalice\n")
    with mutual(ca, clients=(f"@{file}",)) as port:
        bobs = client(ca, port, ca.client("bob"), slot=1)
        with client(ca, port, ca.client("alice")) as alice, bobs as bob:
            alice.open(1)
            with pytest.raises(TrunkRefused):
                bob.open(1)
            file.write_text("bob\n")
            renew((str(file),))
            bob.open(1)
            with pytest.raises(TrunkRefused, match="'alice' is not on"):  # its connection is open
                alice.wait_version(0)
            file.unlink()
            bob.wait_version(0)
    assert any(
        "former subjects of --allow-client stay in force" in line for line in caplog.messages
    )


def test_client_ca_is_read_again_when_it_changes(
    ca: Authority, other: Authority, tmp_path: Path
) -> None:
    file = tmp_path / "client-ca.pem"
    file.write_bytes(Path(ca.root).read_bytes())
    with mutual(ca, client_ca=file) as port:
        with client(ca, port, ca.client("alice")) as alice:
            alice.open(1)
        file.write_bytes(Path(other.root).read_bytes())
        renew((str(file),))
        with client(ca, port, other.client("carol"), slot=1) as carol:
            assert carol.open(1).session
        assert "not signed by the CA in --client-ca" in failure(ca, port, ca.client("alice"))


def test_stolen_token_gets_the_answer_of_an_unknown_one(ca: Authority) -> None:
    with mutual(ca, make_engine(TinyTrunk())) as port:
        with leader(ca, port, ca.client("server-app")) as link:
            link.begin_round(plan())
            alice, thief = ca.client("alice"), ca.client("thief")
            texts = []
            with client(ca, port, alice) as honest:
                honest.open(1)
                before = link.status()
                for token in ("token-0", "a token that nobody has"):
                    with client(ca, port, thief, token=token) as one:
                        with pytest.raises(TrunkRefused) as refused:
                            one.open(1)
                        texts.append((refused.value.reason, str(refused.value)))
                assert texts[0] == texts[1]
                after = link.status()
                assert [slot.joined for slot in after.slots] == [True]
                assert (after.phase, after.version) == (before.phase, before.version)
                with client(ca, port, alice) as again:  # its own new connection is taken
                    assert again.open(1).slot == 0


def test_certificate_that_ends_while_its_connection_is_open_is_refused(ca: Authority) -> None:
    short = ca.client("short", ends=datetime.timedelta(seconds=3))
    with mutual(ca) as port, client(ca, port, short) as one:
        one.open(1)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                one.wait_version(0)
            except TrunkRefused as error:
                assert error.reason is RefusalReason.UNAUTHENTICATED
                assert "'short' ended at" in str(error) and "Renew it" in str(error)
                return
    pytest.fail("the certificate never ended")


def test_health_check_needs_a_certificate_too(ca: Authority) -> None:
    with mutual(ca) as port:
        address = f"127.0.0.1:{port}"
        with pytest.raises(TrunkError, match="asks for a client certificate"):
            health_of(address, ca.root)
        assert health_of(address, ca.root, certificate=ca.client("probe")) == "SERVING"


def test_audit_log_names_the_certificate_of_a_call(ca: Authority, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit, mutual(ca, clients=("alice",), audit=audit) as port:
        with client(ca, port, ca.client("bob")) as bob, pytest.raises(TrunkRefused):
            bob.open(1)
    line = path.read_text().splitlines()[0]
    assert '"certificate": "bob"' in line and '"outcome": "REFUSED"' in line


@pytest.mark.parametrize(
    ("content", "told"), [(b"no certificate", "holds no PEM block"), (None, "No such file")]
)
def test_client_ca_that_cannot_be_used_is_an_error_at_the_start(
    ca: Authority, tmp_path: Path, content: bytes | None, told: str
) -> None:
    file = tmp_path / "client-ca.pem"
    if content is not None:
        file.write_bytes(content)
    certificate, key = ca.sign()
    with pytest.raises(ConfigError, match=f"--client-ca.*{told}"):
        TrunkServer(
            FakeEngine(),
            coordinator_token="t",
            tls_certificate=certificate,
            tls_key=key,
            mutual=MutualTls(client_ca=str(file)),
        )


def test_list_that_others_can_write_is_an_error_with_the_remedy(
    ca: Authority, tmp_path: Path
) -> None:
    file = tmp_path / "clients"
    file.write_text("alice\n")
    file.chmod(0o666)
    with pytest.raises(ConfigError, match=f"--allow-client: .*chmod o-w {file}"):
        with mutual(ca, clients=(f"@{file}",)):
            pass


def test_certificate_without_tls_and_half_a_certificate_are_errors(ca: Authority) -> None:
    with pytest.raises(ConfigError, match=r"over TLS alone.*trunk\.root-certificates"):
        remote(1, certificate=ca.client("alice"))
    with pytest.raises(ConfigError, match="only one is named"):
        ClientCertificate("a.crt", "")
    with pytest.raises(ConfigError, match="--client-ca asks .* takes TLS"):
        TrunkServer(FakeEngine(), coordinator_token="t", mutual=MutualTls(client_ca=ca.root))
