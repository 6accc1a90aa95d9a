"""What tells a worker that it holds the wrong thing."""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.supercore.object_ref import load_app

from flower_split.client.worker.identity import WorkerIdentity, find_app, process_mark
from flower_split.client.worker.sockets import NodeProcess
from flower_split.errors import WorkerError
from tests.support.worker_rig import COUNTING, PROJECT, context

IDENTITY = WorkerIdentity(
    code="0.1.0 a",
    app="mine:app",
    folder="/app",
    app_files="b",
    run=1,
    node_process="2@3",
    interpreter="/bin/python",
    import_path=("/app", "/lib"),
)
OTHER = {
    "code": "0.1.0 b",
    "app": "mine:other",
    "folder": "/app2",
    "app_files": "c",
    "run": 2,
    "node_process": "2@4",
    "interpreter": "/bin/python3",
    "import_path": ("/lib", "/app"),
}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClientApp:
    """As Flower loads an app: its directory first on the import path."""
    (tmp_path / "counting_client.py").write_text(COUNTING)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "counting_client", raising=False)
    found = load_app("counting_client:app", ValueError, tmp_path)
    assert isinstance(found, ClientApp)
    return found


def test_same_is_the_same_also_when_it_was_written() -> None:
    assert WorkerIdentity.read(IDENTITY.write()) == IDENTITY
    assert IDENTITY.differs(WorkerIdentity.read(IDENTITY.write())) == ()


@pytest.mark.parametrize("name", [item.name for item in fields(WorkerIdentity)])
def test_every_field_counts(name: str) -> None:
    assert IDENTITY.differs(replace(IDENTITY, **{name: OTHER[name]})) == (name,)  # type: ignore[arg-type]


def test_another_versions_fields_are_not_read() -> None:
    with pytest.raises(ValueError, match="has the fields"):
        WorkerIdentity.read('{"code": "0.0.9"}')


def test_here_tells_the_app_by_the_object_that_flower_has_loaded(
    app: ClientApp, tmp_path: Path
) -> None:
    found = WorkerIdentity.here(app, context())
    assert (found.app, found.folder, found.run) == ("counting_client:app", str(tmp_path), 5)
    assert found.node_process == process_mark(os.getppid())
    assert found.import_path[0] == str(tmp_path)


def test_supernode_of_a_launcher_is_the_node_process_whoever_started_the_app(
    app: ClientApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_SPLIT_NODE_PROCESS", str(os.getpid()))
    assert WorkerIdentity.here(app, context()).node_process == process_mark(os.getpid())


def test_app_that_no_project_names_has_no_worker() -> None:
    with pytest.raises(WorkerError, match="names this object as its clientapp"):
        find_app(ClientApp(), sys.path)


@pytest.mark.parametrize("file", ["counting_client.py", "data.json"])
def test_changed_file_of_the_app_is_seen_and_a_bytecode_file_is_not(
    app: ClientApp, tmp_path: Path, file: str
) -> None:
    before = WorkerIdentity.here(app, context())
    (tmp_path / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "__pycache__" / "more.pyc").write_bytes(b"x")
    assert WorkerIdentity.here(app, context()) == before
    (tmp_path / file).write_text("changed = True")
    assert before.differs(WorkerIdentity.here(app, context())) == ("app_files",)


def test_installed_distribution_is_seen(
    app: ClientApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path.parent / f"{tmp_path.name}-env" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    before = WorkerIdentity.here(app, context())
    (installed / "plugin-1.1.dist-info").mkdir()
    assert before.differs(WorkerIdentity.here(app, context())) == ("code",)


def test_later_process_with_the_same_id_is_not_taken_for_the_node() -> None:
    mark = process_mark(os.getpid())
    pid, _, start = mark.partition("@")
    os.close(NodeProcess.open(mark).descriptor)
    with pytest.raises(WorkerError, match=f"process {pid} has ended"):
        NodeProcess.open(f"{pid}@{int(start) - 1}")
