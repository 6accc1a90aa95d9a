"""The ClientApp with a worker: who answers, what it loads itself, and what it says where there is none."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.supercore.object_ref import load_app

from flower_split.cli.worker import show_workers
from flower_split.client.app import wants_worker
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.state import ask_worker
from tests.support.worker_rig import COUNTING, PROJECT, context, facts_of, message

THIN = """
import sys
import flwr.supernode.cli.flwr_clientapp
import flower_split.client.app
import flower_split.client.worker.asking
heavy = {"torch", "transformers", "datasets", "peft", "safetensors", "ray"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Flower's home, in a process that looks as the one that Flower starts for a message."""
    home = tmp_path / "home"
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["/somewhere/flwr-clientapp", "--token", "secret"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "counting_client", raising=False)
    yield home
    logging.getLogger("flower_split").handlers.clear()
    logging.getLogger("flower_split").propagate = True


@pytest.fixture
def app(home: Path, tmp_path: Path) -> ClientApp:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "counting_client.py").write_text(COUNTING)
    (folder / "pyproject.toml").write_text(PROJECT)
    found = load_app("counting_client:app", ValueError, folder)
    assert isinstance(found, ClientApp)
    return found


def test_message_is_answered_by_the_nodes_worker_which_the_command_shows_and_ends(
    app: ClientApp, capsys: pytest.CaptureFixture[str]
) -> None:
    node = context()
    first, second = (facts_of(app(message("train"), node)) for _ in range(2))
    pid = int(str(first["pid"]))
    assert (first["count"], second["count"]) == (1, 2)
    assert pid == second["pid"] and pid != os.getpid()
    assert node.state.metric_records["seen"]["rounds"] == 2
    assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert show_workers() == 0
    assert (
        f"node 7: process {pid}, run 5, 2 messages answered, has waited" in capsys.readouterr().out
    )
    assert show_workers(7, end=True) == 0
    assert capsys.readouterr().out.endswith("; it ends\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert show_workers(7) == 1
    assert "there is no worker of node 7 at" in capsys.readouterr().out


def test_without_a_worker_the_process_answers_by_itself_and_says_why(
    app: ClientApp, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "flower-split" / "workers").mkdir(parents=True)
    (home / "flower-split" / "workers").chmod(0o755)
    assert facts_of(app(message("train"), context()))["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert "WARNING: node=7 not answered by the node's worker: " in said
    assert "chmod 700" in said and "This process answers by itself" in said


@pytest.mark.parametrize(
    ("node", "run", "wanted"),
    [("", "", True), ("", "off", False), ("off", "auto", False), ("auto", "off", True)],
)
def test_node_decides_then_the_run_and_auto_is_the_default(
    app: ClientApp, home: Path, node: str, run: str, wanted: bool
) -> None:
    asked = context()
    if node:
        asked.node_config["client-worker"] = node
    if run:
        asked.run_config["train.client-worker"] = run
    assert wants_worker(asked) is wanted
    if not wanted:
        assert facts_of(app(message("train"), asked))["pid"] == os.getpid()
        assert not home.exists()


def test_process_that_keeps_what_it_loads_asks_no_worker(
    app: ClientApp, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/ray/default_worker.py"])
    assert facts_of(app(message("train"), context()))["pid"] == os.getpid()
    assert not home.exists()


def test_nobody_listens_where_there_was_no_worker(home: Path) -> None:
    with WorkerDirectory.open() as directory:
        assert ask_worker(directory, 7) is None
    assert show_workers() == 0


def test_process_of_a_message_loads_no_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", THIN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
