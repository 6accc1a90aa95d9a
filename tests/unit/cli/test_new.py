"""``flower-split new``: an app that Flower takes, whose own data function is used."""

import importlib
import shutil
import stat
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flower_split.cli.app_config import App, load_app
from flower_split.cli.main import main
from flower_split.config import run_config_keys
from flower_split.data import DATA_SOURCES, SourceRequest
from flower_split.data.tally import Tally


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    assert main(["new", str(tmp_path / "my-job")]) == 0
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield load_app(tmp_path / "my-job")
    for name in ("my_job", "my_job.data"):
        sys.modules.pop(name, None)


def test_new_writes_every_key_with_its_own_data_source(made: App) -> None:
    assert made.values.keys() == run_config_keys().keys()
    assert made.config({}).data.source == "my_job.data:AppData"
    folder = made.project.parent
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *(".gitignore", "README.md", "my_job/__init__.py", "my_job/data.py", "pyproject.toml")
    ]
    assert "$" not in (folder / "pyproject.toml").read_text()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr
def test_flwr_build_takes_a_new_app_without_warnings(made: App) -> None:
    config, warnings = load_and_validate(made.project)
    assert not warnings and config["project"]["name"] == "my-job"
    bundle = build_fab_from_disk(made.project.parent)
    assert b"my_job/data.py" in bundle and b"pyproject.toml" in bundle


@pytest.mark.slow  # a whole run; twenty seconds on two idle cores
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr
def test_app_runs_from_the_built_file(made: App, tmp_path: Path) -> None:
    built = build_fab_from_disk(made.project.parent)
    shutil.rmtree(made.project.parent)
    folder = install_from_fab(built, tmp_path / "flower", skip_prompt=True)
    small = (
        "num-server-rounds=1 train.local-steps=1 data.max-eval-batches=1 local-only-baseline=false "
        f'report="" run-dir="{tmp_path / "run"}"'
    )
    assert main(["run", str(folder), "--local", "--run-config", small]) == 0
    assert '"clients": 2' in (tmp_path / "run" / "summary.json").read_text()


def test_components_of_a_new_app_load(made: App) -> None:
    components = tomllib.loads(made.project.read_text())["tool"]["flwr"]["app"]["components"]
    for name, reference in components.items():
        module, _, attribute = reference.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, {"clientapp": ClientApp, "serverapp": ServerApp}[name])


def test_function_in_data_py_gives_every_client_texts_of_its_own(made: App) -> None:
    made.make_importable()
    config = made.config({}).data
    source = DATA_SOURCES.get(config.source)()
    mine, others = (
        source.read(
            SourceRequest(config=config, partition_id=slot, num_partitions=2, tally=Tally())
        )
        for slot in range(2)
    )
    assert mine.own and len(mine.records) > 20 and len(others.records) > 20
    texts = [{str(record.content["text"]) for record in found.records} for found in (mine, others)]
    assert len(texts[0] & texts[1]) < 5  # the same sentence may stand in two modules


def test_readme_commands_of_a_new_app_exist(made: App) -> None:
    readme = (made.project.parent / "README.md").read_text()
    for command in ("run", "export", "trunk"):
        assert f"flower-split {command}" in readme
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0


@pytest.mark.parametrize("name", ["json", "torch", "two words", "class", "1st", "a" * 33])
def test_new_refuses_a_name_that_flower_or_python_cannot_use(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", str(tmp_path / name)]) == 2
    assert repr(name) in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_new_leaves_a_directory_that_holds_something_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    assert main(["new", str(tmp_path / "mine")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_new_in_a_folder_that_cannot_be_written_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["new", str(tmp_path / "file" / "job")]) == 2
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
    assert "cannot be written" in capsys.readouterr().err
