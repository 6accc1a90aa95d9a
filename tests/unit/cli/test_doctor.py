"""``flower-split doctor``: each examination on a machine that is well and on one that is not."""

import datetime
import email.utils
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from flower_split.cli.connections import Connection
from flower_split.cli.doctor import credentials, machine, network
from flower_split.cli.doctor.findings import Finding, Level
from flower_split.cli.doctor.trunk import described
from flower_split.cli.main import main
from flower_split.protocol.values import ExperimentReport, TrunkStatus

OK, WARNING, PROBLEM = Level.OK, Level.WARNING, Level.PROBLEM


def installed(name: str) -> str:
    if name == "absent":
        raise PackageNotFoundError(name)
    return {"torch": "2.5.1", "peft": "0.20"}[name]


def test_versions_name_what_is_missing_and_what_is_too_old() -> None:
    wanted = ["torch>=2.6", "peft>=0.18", "absent", 'trl>=1; extra == "trl"']
    found = machine.versions(wanted, installed)
    assert found.level is PROBLEM and found.remedy
    assert found.text == "torch is 2.5.1, not >=2.6; absent is missing"


def test_versions_of_this_environment_are_right() -> None:
    found = machine.versions()
    assert found.level is OK and "flwr 1." in found.text


def test_accelerator_that_torch_does_not_see_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert machine.accelerator(tmp_path / "nvidiactl", lambda: []).level is WARNING
    assert machine.accelerator(tmp_path / "nvidiactl", lambda: ["H"]) == Finding(
        "accelerator", OK, "H"
    )
    assert machine.accelerator(tmp_path / "absent", lambda: []).level is OK


@pytest.mark.parametrize(("gib", "level"), [(0.5, PROBLEM), (3.0, WARNING), (9.0, OK)])
def test_disk_with_little_room_is_told(gib: float, level: Level, tmp_path: Path) -> None:
    [found] = machine.disks({"runs": tmp_path / "not" / "yet"}, lambda _: int(gib * 2**30))
    assert found.level is level and f"{gib:.1f} GiB" in found.text and str(tmp_path) in found.text


def test_shared_memory_and_open_files_have_bounds(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path, 64 << 20).level is WARNING  # docker's default
    assert machine.shared_memory(tmp_path, 2 << 30).level is OK
    levels = [machine.open_files(count).level for count in (100, 1024, 65536)]
    assert levels == [PROBLEM, WARNING, OK]


def test_port_that_somebody_listens_on_is_a_problem_and_names_the_process() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = network.can_listen(f"127.0.0.1:{port}")
        assert found.level is PROBLEM and "(process " in found.text
        local = network.local_superlink(port)
    assert local.level is OK and "of this environment" in local.text
    assert network.can_listen(f"127.0.0.1:{port}").level is OK
    assert network.can_listen("127.0.0.1:http").level is PROBLEM
    assert network.local_superlink(port).level is OK


def test_proxy_for_loopback_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert network.proxies() == Finding("proxy", OK, "none is set")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    found = network.proxies()
    assert found.level is WARNING and "no_proxy" in found.remedy
    assert "proxy.example" not in found.text  # a proxy's address may hold a password
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert network.proxies().level is OK


class Health(BaseHTTPRequestHandler):
    ahead = 0.0  # seconds

    def do_GET(self) -> None:  # noqa: N802 - the standard library's name
        self.send_response_only(200)
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.ahead)
        self.send_header("Date", email.utils.format_datetime(now, usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def superlink(request: pytest.FixtureRequest) -> Iterator[Connection]:
    handler = type("Late", (Health,), {"ahead": request.param})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Connection("far", f"127.0.0.1:{server.server_port}", insecure=True)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("superlink", "level"), [(0, OK), (7200, PROBLEM)], indirect=["superlink"])
def test_clock_two_hours_from_the_superlinks_is_a_problem(
    superlink: Connection, level: Level
) -> None:
    answers, clock = network.superlink(superlink)
    assert answers.level is OK and clock.level is level
    if level is PROBLEM:
        assert "7200 s ahead" in clock.text or "7199 s ahead" in clock.text


@pytest.mark.parametrize("superlink", [0], indirect=True)
def test_superlink_without_the_tls_that_is_asked_for_is_a_problem(superlink: Connection) -> None:
    [found] = network.superlink(Connection("far", superlink.address))
    assert found.level is PROBLEM and "TLS" in found.text


def test_superlink_that_is_not_there_is_a_problem() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    [found] = network.superlink(Connection("far", address, insecure=True))
    assert found.level is PROBLEM and "does not answer" in found.text


def test_certificate_is_told_by_its_dates(tmp_path: Path) -> None:
    assert main(["certs", str(tmp_path / "c"), "--days", "30"]) == 0
    file, now = tmp_path / "c" / "ca.crt", datetime.datetime.now(datetime.UTC)
    days = datetime.timedelta(days=1)
    levels = [
        credentials.certificate("ca", file, now + offset).level
        for offset in (0 * days, 20 * days, 31 * days, -1 * days)
    ]
    assert levels == [OK, WARNING, PROBLEM, PROBLEM]
    assert credentials.certificate("ca", tmp_path / "absent").level is PROBLEM


def test_token_file_that_others_can_read_is_a_problem(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a secret of some length")
    token.chmod(0o644)
    assert credentials.secret("trunk.token-file", token).level is PROBLEM
    token.chmod(0o600)
    assert credentials.secret("trunk.token-file", token).level is OK


@pytest.mark.parametrize(
    ("environment", "level", "text"),
    [
        ({}, Level.WARNING, "is not set here"),
        ({"FLOWER_SPLIT_TRUNK_TOKEN": " "}, Level.WARNING, "is not set here"),
        ({"FLOWER_SPLIT_TRUNK_TOKEN": "short"}, Level.PROBLEM, "at least 16 characters"),
        ({"FLOWER_SPLIT_TRUNK_TOKEN": "a secret of some length"}, Level.OK, "is set"),
    ],
)
def test_token_of_the_environment_is_looked_at_where_no_file_is_named(
    environment: dict[str, str], level: Level, text: str
) -> None:
    found = credentials.token_of_environment(environment)
    assert found.level is level and text in found.text
    assert "a secret" not in found.text


def test_trunk_of_another_model_or_at_work_is_told() -> None:
    theirs = {"mode": "joint", "dtype": "float32"}
    status = TrunkStatus(
        epoch=1, version=3, experiment="e7", server_round=2, phase="open", fingerprint=theirs
    )
    answers, differs, busy = described("trunk t", status, {"mode": "joint", "dtype": "bfloat16"})
    assert [item.level for item in (answers, differs, busy)] == [OK, PROBLEM, WARNING]
    assert "dtype (bfloat16 here, float32 there)" in differs.text and "e7" in busy.text


def test_json_has_every_finding_and_the_exit_code_follows_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "absent.crt")
    assert main(["doctor", "--json", "--certificate", missing]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["healthy"] is False
    [wrong] = [item for item in printed["findings"] if item["level"] == "problem"]
    assert wrong["subject"] == "certificate" and missing in wrong["text"] and wrong["remedy"]


def test_trunk_of_several_experiments_must_agree_on_the_base_alone() -> None:
    theirs = {"mode": "joint", "dtype": "bfloat16", "lora.trunk": "r=8", "weights": "a"}
    status = TrunkStatus(
        epoch=1,
        version=0,
        fingerprint=theirs,
        max_experiments=2,
        experiments=(ExperimentReport(name="a"), ExperimentReport(name="b")),
    )
    mine = {"mode": "frozen", "dtype": "bfloat16", "lora.trunk": "r=4", "weights": "a"}
    answers, full = described("trunk t", status, mine)
    assert "places for experiments are taken" in full.text
    other = described("trunk t", status, {**mine, "dtype": "float32", "weights": "b"})[1]
    assert "dtype" in other.text and "weights" in other.text and "lora.trunk" not in other.text
