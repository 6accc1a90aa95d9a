"""The default job's app directory."""

import tomllib
from pathlib import Path

from flower_split.cli.app_config import load_app_config
from flower_split.config import run_config_keys

APP = Path(__file__).parents[2] / "simulations" / "quickstart"


def test_quickstart_has_every_run_config_key_and_no_other() -> None:
    # Flower overrides only keys that the app has, so one that is missing could not be set at all.
    project = tomllib.loads((APP / "pyproject.toml").read_text())

    def flatten(table: dict[str, object], prefix: str = "") -> set[str]:
        keys: set[str] = set()
        for key, value in table.items():
            if isinstance(value, dict):
                keys |= flatten(value, f"{prefix}{key}.")
            else:
                keys.add(prefix + key)
        return keys

    assert flatten(project["tool"]["flwr"]["app"]["config"]) == set(run_config_keys())


def test_quickstart_parses_and_installs_nothing() -> None:
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == []
    assert load_app_config(APP, None).num_clients == 4
