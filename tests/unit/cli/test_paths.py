"""Relative paths mean what they mean where the command is given."""

from pathlib import Path

import pytest

from flower_split.cli.overrides import parse_overrides
from flower_split.cli.paths import absolute_paths, as_run_config
from flower_split.cli.run import RunCommand, prepare
from flower_split.config import parse_run_config, resolved_run_config
from flower_split.errors import ConfigError


def test_absolute_paths_change_relative_paths_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    config = parse_run_config(
        {
            "model.name": "my-model",
            "data.source": "jsonl",
            "data.path": "data/{partition_id}.jsonl",
            "trunk.token-file": "/etc/token",
            "run-dir": "out",
        }
    )
    before, after = resolved_run_config(config), absolute_paths(config, tmp_path)
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "model.name": str(tmp_path / "my-model"),
        "data.path": str(tmp_path / "data/{partition_id}.jsonl"),
        "run-dir": str(tmp_path / "out"),
    }
    assert after["trunk.token-file"] == "/etc/token"


@pytest.mark.parametrize("name", ["quickstart", "some-org/some-model"])
def test_absolute_paths_leave_names_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "quickstart").mkdir()  # not the packaged model of that name
    config = parse_run_config({"model.name": name})
    assert absolute_paths(config, tmp_path) == resolved_run_config(config)


def test_as_run_config_is_read_back_by_flower() -> None:
    from flwr.common.config import parse_config_args

    values = {"run-dir": "/a b/c", "num-clients": 3, "resume-previous": True, "x": 'say "yes"'}
    assert parse_config_args([as_run_config(values)]) == values


def test_as_run_config_keeps_all_keys_of_a_group() -> None:
    from flwr.common.config import parse_config_args

    values = {"data.source": "jsonl", "data.path": "/a", "trunk.optimizer.name": "sgd"}
    assert parse_config_args([as_run_config(values)]) == values


def test_as_run_config_with_both_quotes_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.path must not hold both"):
        as_run_config({"data.path": 'it\'s "here"'})


def test_parse_overrides_of_several_values_keeps_all_keys_of_a_group(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text('data.split = "test"\nseed = 3\n')
    values = ['data.source="jsonl" seed=1', 'data.path="x"', str(tmp_path / "more.toml")]
    assert parse_overrides(values) == {
        "data.source": "jsonl",
        "data.path": "x",
        "data.split": "test",
        "seed": 3,
    }


def test_prepare_gives_flower_every_override_and_the_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    (tmp_path / "mine.jsonl").touch()
    app = request.config.rootpath / "simulations" / "quickstart"
    values = ['data.source="jsonl"', 'data.path="mine.jsonl" seed=4']
    job = prepare(RunCommand(app=app, run_config=values), tmp_path)
    given = dict(job.overrides)
    run_directory = given.pop("run-dir")
    assert Path(str(run_directory)).parent == tmp_path / "runs"
    assert str(job.directory) == run_directory
    path = str(tmp_path / "mine.jsonl")
    assert given == {"data.source": "jsonl", "data.path": path, "seed": 4}
