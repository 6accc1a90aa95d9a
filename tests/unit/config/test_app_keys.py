"""Keys under ``app.`` are the app's own: they pass through as they are."""

import json
from pathlib import Path

import pytest

from flower_split.cli.app_config import load_app, load_app_config
from flower_split.config import Scalar, parse_run_config, resolved_run_config, run_config_keys
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.experiments.grid import parse_grid
from flower_split.parties.fingerprint import settings
from flower_split.runs.directory import RunDirectory
from flower_split.runs.resuming import check_may_change
from tests.support.tiny_app import make_app

OWN: dict[str, Scalar] = {
    "app.Topic_Name": "sea",
    "app.weights.my_head": 3,
    "app.on": True,
    "app.rate": 0.5,
}
MEANT = {"Topic_Name": "sea", "weights.my_head": 3, "on": True, "rate": 0.5}


def test_keys_of_the_app_are_kept_as_they_are_written() -> None:
    config = parse_run_config({"seed": 3, **OWN})
    assert config.app == MEANT and config.seed == 3
    assert [type(value) for value in config.app.values()] == [str, int, bool, float]
    assert {
        key: value for key, value in resolved_run_config(config).items() if "app." in key
    } == OWN
    assert parse_run_config(resolved_run_config(config)) == config


def test_they_are_no_keys_of_the_package() -> None:
    assert not [key for key in run_config_keys() if key.startswith("app")]
    assert settings(parse_run_config(OWN)) == settings(parse_run_config({}))
    for unknown in ("app", "apps.topic", "application"):
        with pytest.raises(ConfigError, match=f"unknown run-config key '{unknown}'"):
            parse_run_config({unknown: "sea"})


def test_a_run_directory_has_them_and_a_resumed_run_needs_the_same(tmp_path: Path) -> None:
    config = parse_run_config({"run-dir": str(tmp_path / "run"), **OWN})
    RunDirectory.create(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["app.Topic_Name"] == "sea"
    assert RunDirectory.open(tmp_path / "run").config.app == MEANT
    check_may_change(config, parse_run_config(OWN))
    for others in ({**OWN, "app.Topic_Name": "land"}, {}, {**OWN, "app.more": 1}):
        with pytest.raises(RunDirectoryError, match=r"app\.(Topic_Name|more) = "):
            check_may_change(config, parse_run_config(others))


def test_the_command_reads_overrides_and_sweeps_them_where_the_app_has_them(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", OWN)
    config = load_app_config(app, ["app.Topic_Name='land'", "app.rate=0.25"])
    assert config.app == {**MEANT, "Topic_Name": "land", "rate": 0.25}
    assert load_app(app).overrides_for(config) == {"app.Topic_Name": "land", "app.rate": 0.25}
    with pytest.raises(ConfigError, match=r"Add it to \[tool.flwr.app.config\]"):
        load_app_config(app, ["app.unheard=1"])
    assert parse_grid("app.rate=0.1,0.2 app.Topic_Name='sea','land'") == {
        "app.rate": (0.1, 0.2),
        "app.Topic_Name": ("sea", "land"),
    }
