"""``flower-split certs``: files that TLS takes, keys that are their owner's alone."""

import datetime
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from flower_split.cli.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "certificates"
    options = ["--host", "trunk.example", "--host", "10.0.0.7", "--client", "clinic-a"]
    assert main(["certs", str(directory), *options, "--days", "30"]) == 0
    return directory


def handshake(made: Path, host: str, client: str | None, *, wants_client: bool) -> str:
    """Python's own TLS on both ends of a socket pair; returns the protocol, or raises SSLError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "server.crt", made / "server.key")
    if wants_client:
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(made / "ca.crt")
    caller = ssl.create_default_context(cafile=made / "ca.crt")
    if client:
        caller.load_cert_chain(made / f"{client}.crt", made / f"{client}.key")
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    problems: list[OSError] = []

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as secure:
                secure.sendall(b"served")
        except OSError as error:
            problems.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with caller.wrap_socket(ours, server_hostname=host) as secure:
            assert secure.recv(6) == b"served"
            return str(secure.version())
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("host", ["trunk.example", "10.0.0.7", "localhost", "127.0.0.1", "::1"])
def test_server_certificate_is_taken_for_every_host_named(made: Path, host: str) -> None:
    assert handshake(made, host, None, wants_client=False) == "TLSv1.3"


def test_server_certificate_is_refused_for_another_host(made: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(made, "elsewhere.example", None, wants_client=False)


def test_client_certificate_is_taken_and_its_absence_refused(made: Path) -> None:
    assert handshake(made, "localhost", "clinic-a", wants_client=True) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        handshake(made, "localhost", None, wants_client=True)


def test_server_certificate_is_no_clients(made: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
        handshake(made, "localhost", "server", wants_client=True)


def test_keys_are_their_owners_alone_and_node_key_is_of_flowers_kind(made: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    secret = {"ca.key", "server.key", "clinic-a.key", "clinic-a.node"}
    assert {name for name, mode in modes.items() if mode == 0o600} == secret
    assert modes.keys() - secret == {"ca.crt", "server.crt", "clinic-a.crt", "clinic-a.node.pub"}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    key = load_ssh_private_key((made / "clinic-a.node").read_bytes(), None)
    public = (made / "clinic-a.node.pub").read_text()
    assert public.startswith("ecdsa-sha2-nistp384 ") and key is not None


def test_certificates_end_after_the_days_asked_for(made: Path) -> None:
    for name in ("ca", "server", "clinic-a"):
        certificate = x509.load_pem_x509_certificate((made / f"{name}.crt").read_bytes())
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


def test_second_call_adds_a_client_of_the_same_ca_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", str(tmp_path / "c")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert main(["certs", str(tmp_path / "c"), "--client", "late"]) == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert before.items() <= after.items()
    assert handshake(tmp_path / "c", "localhost", "late", wants_client=True) == "TLSv1.3"
    assert main(["certs", str(tmp_path / "c"), "--host", "new.example"]) == 2
    assert "server.crt is there already" in capsys.readouterr().err


def test_ca_key_that_others_can_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", str(tmp_path)]) == 0
    (tmp_path / "ca.key").chmod(0o644)
    assert main(["certs", str(tmp_path), "--client", "late"]) == 2
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"), [(["--client", "../x"], "'../x'"), (["--days", "0"], "from 1 to 825")]
)
def test_wrong_values_are_refused_before_anything_is_written(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", str(tmp_path / "c"), *options]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "c").exists()
