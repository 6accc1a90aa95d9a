"""Relative paths mean what they mean where the command is given."""

from pathlib import Path

from flower_split.cli.paths import as_run_config, path_overrides
from flower_split.config import parse_run_config


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

    values = {"run-dir": "/a b/c", "num-clients": 3, "resume-previous": True}
    assert parse_config_args([as_run_config(values)]) == values
