"""The command's own SuperLink: started anew, found again, ended by its id; with fake processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flower_split.cli import processes
from flower_split.cli.flwr import Flwr
from flower_split.cli.superlink import LocalSuperLink
from flower_split.errors import FederationError, RunDirectoryError

ANSWERS = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
HANGS = "import signal; signal.pause()"
FAILS = "import sys; print('no such option: --simulation'); sys.exit(2)"


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_start_waits_for_the_answer_and_end_ends_the_process(tmp_path: Path) -> None:
    link = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    assert link.alive and processes.start_of(link.state.pid) == link.state.started
    assert f"127.0.0.1:{link.state.port}" in (tmp_path / "flower/config.toml").read_text()
    assert link.flwr.environment == {"FLWR_HOME": str(tmp_path / "flower")}
    link.note_run("12")
    found = LocalSuperLink.find(tmp_path)
    assert found is not None and found.alive and found.state.run_id == "12"
    link.end()
    assert not link.alive and not found.alive
    assert processes.start_of(link.state.pid) is None


def test_start_beside_one_that_still_runs_is_refused_and_ends_nothing(tmp_path: Path) -> None:
    link = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    try:
        with pytest.raises(RunDirectoryError, match=f"attach {tmp_path}"):
            LocalSuperLink.start(tmp_path, program=program(ANSWERS))
        assert link.alive
    finally:
        link.end()


def test_start_after_one_that_was_killed_begins_with_nothing_of_it(tmp_path: Path) -> None:
    link = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    (link.folder / "state.db").write_text("half a migration")
    processes.kill_session(link.state.pid)
    link.end()
    again = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    assert not (again.folder / "state.db").exists()
    again.end()


def test_a_superlink_that_does_not_start_in_time_is_ended_and_its_log_named(
    tmp_path: Path,
) -> None:
    with pytest.raises(FederationError, match=r"did not answer within 0.5 s.*superlink.log"):
        LocalSuperLink.start(tmp_path, seconds=0.5, program=program(HANGS))
    found = LocalSuperLink.find(tmp_path)
    assert found is not None and not found.alive


def test_a_superlink_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="no such option: --simulation"):
        LocalSuperLink.start(tmp_path, program=program(FAILS))


def test_a_signal_while_it_starts_ends_it(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="interrupted"):
        LocalSuperLink.start(tmp_path, program=program(HANGS), given_up=lambda: True)
    found = LocalSuperLink.find(tmp_path)
    assert found is not None and not found.alive


def test_listens_on_tells_its_own_port_from_anothers(tmp_path: Path) -> None:
    link = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    try:
        assert processes.listens_on(link.state.pid, link.state.port)
        assert not processes.listens_on(os.getpid(), link.state.port)
    finally:
        link.end()


def test_a_process_id_that_was_given_again_is_not_the_superlink(tmp_path: Path) -> None:
    link = LocalSuperLink.start(tmp_path, program=program(ANSWERS))
    link.end()
    path = tmp_path / "flower/superlink.json"
    path.write_text(path.read_text().replace(str(link.state.pid), str(os.getpid())))
    found = LocalSuperLink.find(tmp_path)
    assert found is not None and found.state.pid == os.getpid() and not found.alive


def test_flower_that_does_not_answer_in_time_gives_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Flwr, "_command", lambda self, *arguments: program(HANGS))
    with pytest.raises(FederationError, match="asked to stop run 5 and did not answer within 0.3"):
        Flwr(seconds=0.3).stop("5")


def test_flower_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    says = 'print("{\\"success\\": false, \\"error-message\\": \\"run 5\\\\nis over\\"}")'
    monkeypatch.setattr(Flwr, "_command", lambda self, *arguments: program(says))
    with pytest.raises(FederationError, match="could not stop run 5: run 5 is over"):
        Flwr().stop("5")


def test_log_streams_lines_and_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "print('one'); print('two', flush=True); import signal; signal.pause()"
    monkeypatch.setattr(Flwr, "_command", lambda self, *arguments: program(says))
    started: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def popen(*arguments: object, **options: object) -> "subprocess.Popen[str]":
        started.append(original(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with Flwr().log("5") as lines:
        assert [lines.get(timeout=30), lines.get(timeout=30)] == ["one\n", "two\n"]
    assert started[0].poll() is not None
