"""Relative paths mean what they mean where the command is given."""

from pathlib import Path

import pytest

from flower_split.cli.app_config import parse_overrides
from flower_split.cli.paths import as_run_config, path_overrides
from flower_split.config import parse_run_config
from flower_split.errors import ConfigError


def test_path_overrides_make_relative_paths_absolute(tmp_path: Path) -> None:
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
    assert path_overrides(config, tmp_path) == {
        "model.name": str(tmp_path / "my-model"),
        "data.path": str(tmp_path / "data/{partition_id}.jsonl"),
        "run-dir": str(tmp_path / "out"),
    }


def test_path_overrides_leave_names_alone_and_choose_the_run_directory_here(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()  # not the packaged model of that name
    for name in ("quickstart", "some-org/some-model"):
        overrides = path_overrides(parse_run_config({"model.name": name}), tmp_path)
        assert list(overrides) == ["run-dir"]
        assert Path(overrides["run-dir"]).parent == tmp_path / "runs"


def test_path_overrides_of_a_resumed_run_choose_no_directory(tmp_path: Path) -> None:
    config = parse_run_config({"resume": "runs/x"})
    assert path_overrides(config, tmp_path) == {"resume": str(tmp_path / "runs/x")}


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


def test_run_hands_flower_every_override_and_the_absolute_paths_in_one_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from flwr.common.config import parse_config_args

    from flower_split.cli import run

    submitted: list[list[str]] = []

    def ask(arguments: list[str], what: str) -> dict[str, object]:
        submitted.append(list(arguments))
        return {"run-id": "1"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_ask", ask)
    monkeypatch.setattr(run, "_is_local", lambda superlink: True)
    monkeypatch.setattr(run, "_follow", lambda *arguments: None)
    monkeypatch.setattr(run, "_outcome", lambda *arguments: 0)
    run.run_app(
        request.config.rootpath / "simulations" / "quickstart",
        superlink=None,
        run_config=['data.source="jsonl"', 'data.path="mine.jsonl" seed=4'],
        federation_config=None,
        stream=False,
    )
    (command,) = submitted
    values = [command[i + 1] for i, word in enumerate(command) if word == "--run-config"]
    given = parse_config_args(values)
    assert len(values) == 1
    assert given.pop("run-dir").startswith(str(tmp_path / "runs"))
    path = str(tmp_path / "mine.jsonl")
    assert given == {"data.source": "jsonl", "data.path": path, "seed": 4}
