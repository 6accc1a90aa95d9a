"""The page of a run that goes on: served on loopback, made anew when the run has measured something."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from flower_split.cli.watch import WatchCommand, watch
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.results.report.live_page import LivePage, PageServer
from flower_split.runs.directory import RunDirectory
from tests.unit.results.test_report import Page, make_run

pytest.importorskip("vl_convert")


@contextmanager
def served(page: LivePage) -> Iterator[PageServer]:
    with PageServer(page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(timeout=30)


def get(server: PageServer, path: str, host: str = "") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_page_is_made_anew_when_the_run_has_measured_something(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "summary.json").unlink()  # it goes on
    with served(LivePage([path], seconds=2.5)) as server:
        assert server.server_address[0] == "127.0.0.1"
        _, text = get(server, "/")
        _, version = get(server, "/version")
        shown = Page(text).rows("perplexity")
        overall = [r["perplexity"] for r in shown if r["client"] == "all clients"]
        assert overall == [8.0, 7.0, 6.0] and "run has not finished" in text
        assert version in text and "2500" in text  # what the browser compares, and how often
        assert get(server, "/")[1] == text and get(server, "/version")[1] == version

        RunDirectory.open(path).append("round", {"server_round": 3, "perplexity": 5.5})
        _, later = get(server, "/version")
        _, again = get(server, "/")
        assert later != version and later in again and version not in again
        shown = Page(again).rows("perplexity")
        assert [r["perplexity"] for r in shown if r["client"] == "all clients"][-1] == 5.5

        with (path / "metrics.jsonl").open("a") as file:
            file.write("no JSON\n")
        status, damaged = get(server, "/")
        assert status == 200 and "every line must be a JSON object" in damaged


def test_only_the_page_is_served_and_only_under_its_own_name(tmp_path: Path) -> None:
    with served(LivePage([make_run(tmp_path / "run")], seconds=5.0)) as server:
        assert get(server, "/version", f"localhost:{server.server_port}")[0] == 200
        for host in ("attacker.example", f"attacker.example:{server.server_port}", "127.0.0.1"):
            assert get(server, "/", host)[0] == 403  # a name that leads here by another's DNS
        for path in ("/config.json", "/../run/config.json", "/page", "/version/"):
            assert get(server, path)[0] == 404


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError):
        LivePage([tmp_path / "nothing"], seconds=5.0)
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="--every must be above 0"):
        watch(WatchCommand(runs=[run], seconds=0.0))
    with served(LivePage([run], seconds=5.0)) as server:
        with pytest.raises(ConfigError, match="cannot be had.*Leave it out"):
            watch(WatchCommand(runs=[run], port=server.server_port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_the_address_and_ends_with_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "flower_split.cli.main", "watch", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"watching at http://127\.0\.0\.1:(\d+)/, until Ctrl-C\n", line)
        assert found is not None, line
        connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/version")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "") and "the run goes on" in out
