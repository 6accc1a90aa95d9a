"""What can be known beforehand is said at once: without torch, without Flower, with everything named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flower_split.cli.app_config import load_app
from flower_split.cli.connections import find_connection
from flower_split.cli.main import main
from flower_split.cli.overrides import parse_overrides
from flower_split.cli.run import RunCommand, prepare
from flower_split.config import Scalar, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError, DataError, RunDirectoryError
from flower_split.runs.beforehand import check_files
from flower_split.runs.resuming import MAY_CHANGE, check_may_change, resumed_config
from tests.support.tiny_app import make_app, tiny_config


@pytest.fixture(autouse=True)
def own_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))
    return tmp_path / "flower-home"


def app_in(path: Path, **changes: Scalar) -> Path:
    """An app whose model and data are empty places: nothing here reads them."""
    (path / "model").mkdir(exist_ok=True)
    (path / "data").mkdir(exist_ok=True)
    for partition in range(2):
        (path / "data" / f"{partition}.jsonl").touch()
    data = str(path / "data/{partition_id}.jsonl")
    return make_app(path / "app", tiny_config(path / "model", data, **changes))


def run_in(path: Path, **changes: Scalar) -> Path:
    """A run's directory with a config.json."""
    path.mkdir()
    values = resolved_run_config(parse_run_config({**changes}))
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_the_first_checks_import_neither_torch_nor_flower() -> None:
    code = (
        "import sys, flower_split.cli.main, flower_split.cli.run, flower_split.cli.attach;"
        "print([name for name in ('torch', 'flwr', 'transformers', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_run_directory_with_files_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = app_in(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert main(["run", str(app), "-c", f'run-dir="{tmp_path / "full"}"']) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'full'} holds files" in said and "--resume" in said


def test_a_run_directory_with_nothing_but_an_ended_superlink_is_taken(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    (tmp_path / "again" / "flower").mkdir(parents=True)
    command = RunCommand(app=app, run_config=[f'run-dir="{tmp_path / "again"}"'])
    assert prepare(command, tmp_path).directory == tmp_path / "again"


def test_data_that_is_not_there_is_named_with_its_partition(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    (tmp_path / "data" / "1.jsonl").unlink()
    with pytest.raises(DataError, match=r"data/1.jsonl of partition 1 does not exist.*num-clients"):
        prepare(RunCommand(app=app), tmp_path)


def test_data_of_a_deployment_is_not_looked_for_here() -> None:
    config = parse_run_config({"data.source": "jsonl", "data.path": "/nowhere/x.jsonl"})
    check_files(config, simulated=False)
    with pytest.raises(DataError, match="/nowhere/x.jsonl"):
        check_files(config, simulated=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.name": "/nowhere/model"}, "model.name must be a hub id"),
        ({"trunk.address": "a:1", "trunk.token-file": "/nowhere"}, "trunk.token-file: there is no"),
    ],
)
def test_files_that_are_missing_are_named(values: dict[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_files(parse_run_config(values), simulated=False)


def test_a_key_given_twice_is_named() -> None:
    with pytest.raises(ConfigError, match=r"gives train.batch-size twice in one value: 4 and 8"):
        parse_overrides(["train.batch-size=4 seed=1 train.batch-size=8"])


@pytest.mark.parametrize(
    ("value", "words"),
    [("mode=joint", "mode has a value that is not TOML: joint"), ("seed", "'seed' is no pair")],
)
def test_a_value_that_cannot_be_read_is_named(value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_overrides([value])


@pytest.mark.parametrize(
    "text",
    ['seed=1 mode="frozen"', "a.b.c=0.5 a.b.d='x y' e=true", 'data.path="a=b c"', ""],
)
def test_overrides_are_read_as_flower_reads_them(text: str) -> None:
    from flwr.common.config import parse_config_args

    assert parse_overrides([text]) == parse_config_args([text])


def test_resume_takes_the_runs_own_configuration(tmp_path: Path) -> None:
    app = app_in(tmp_path, seed=3)
    own = tiny_config(tmp_path / "model", str(tmp_path / "data/{partition_id}.jsonl"), seed=9)
    run = run_in(tmp_path / "run", **{**own, "train.batch-size": 2})
    job = prepare(RunCommand(app=app, resume=run), tmp_path)
    assert (job.config.seed, job.config.train.batch_size) == (9, 2)
    assert job.directory == run
    assert dict(job.overrides) == {"seed": 9, "train.batch-size": 2, "resume": str(run)}


def test_resume_with_a_changed_key_names_it_and_what_may_change(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    run = run_in(tmp_path / "run", **{"train.batch-size": 2})
    command = RunCommand(app=app, resume=run, run_config=["train.batch-size=4 seed=1"])
    with pytest.raises(RunDirectoryError) as caught:
        prepare(command, tmp_path)
    assert "train.batch-size = 4, was 2" in str(caught.value)
    assert "seed = 1, was 0" in str(caught.value) and "num-server-rounds" in str(caught.value)


def test_resume_of_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run directory"):
        prepare(RunCommand(app=app_in(tmp_path), resume=tmp_path / "none"), tmp_path)


def test_a_run_may_be_extended_where_its_schedules_are_constant() -> None:
    before = parse_run_config({"num-server-rounds": 3})
    after = resumed_config(before, {"num-server-rounds": 5, "round-timeout": 60.0})
    assert (after.num_server_rounds, after.round_timeout) == (5, 60.0)


@pytest.mark.parametrize("side", ["train", "trunk"])
def test_a_run_whose_schedule_spans_all_rounds_is_not_extended(side: str) -> None:
    before = parse_run_config({f"{side}.optimizer.schedule": "cosine"})
    with pytest.raises(RunDirectoryError, match=rf'{side}.optimizer.schedule = "cosine"'):
        resumed_config(before, {"num-server-rounds": 5})


def test_a_resumed_run_does_not_lose_rounds() -> None:
    with pytest.raises(RunDirectoryError, match="more rounds, not fewer"):
        resumed_config(parse_run_config({"num-server-rounds": 3}), {"num-server-rounds": 2})


def test_every_key_that_may_change_is_a_key_and_may_change() -> None:
    before = parse_run_config({})
    known = resolved_run_config(before)
    assert MAY_CHANGE.keys() <= known.keys()
    check_may_change(before, parse_run_config({"join-timeout": 1.0, "trunk.call-timeout": 9.0}))


def test_help_prints_exit_codes_and_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert all(key in shown for key in MAY_CHANGE)
    assert "3  the SuperLink does not answer" in shown


def test_a_connection_is_flowers_by_name_or_default(own_flower: Path) -> None:
    assert find_connection(None).is_local and find_connection("local").is_local
    own_flower.mkdir()
    (own_flower / "config.toml").write_text(
        '[superlink]\ndefault = "far"\n[superlink.far]\naddress = "host:1"\n'
        '[superlink.here]\naddress = ":local:"\n[superlink.old]\noptions.num-supernodes = 2\n'
    )
    assert find_connection(None).address == "host:1"
    assert not find_connection("far").is_local
    assert find_connection("here").is_local and find_connection("old").is_local
    with pytest.raises(ConfigError, match=r"no SuperLink connection 'near' \(it has: far, here"):
        find_connection("near")


def test_an_app_without_a_key_that_a_resumed_run_needs_is_named(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    project = app / "pyproject.toml"
    lines = [line for line in project.read_text().split("\n") if not line.startswith("seed =")]
    project.write_text("\n".join(lines))
    config = parse_run_config({"seed": 4})
    with pytest.raises(ConfigError, match="'seed'.*Add it to"):
        load_app(app).overrides_for(config)
