"""An app's directory: its name and its run config, with the command line's overrides."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

import click
from flwr.common.config import flatten_dict, parse_config_args

from flower_split.config import RunConfig, Scalar, parse_run_config
from flower_split.errors import ConfigError


def load_app_config(app: Path, overrides: Sequence[str] | None) -> RunConfig:
    """The run config that ``flwr run APP --run-config …`` would use, checked.

    Args:
        app: The app's directory.
        overrides: Values of ``--run-config``: ``key=value`` pairs, or paths of TOML files.

    Raises:
        ConfigError: There is no app, or a key or value is wrong.
    """
    path, table = _app_table(app)
    section = table.get("config", {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: [tool.flwr.app.config] must be a table of keys.")
    config = flatten_dict(section)
    given = parse_overrides(overrides)
    for key in given:
        if key not in config:
            parse_run_config({key: given[key]})  # an unknown key is told with its nearest name
            raise ConfigError(
                f"{key!r} is a key of this package, but Flower overrides only keys that the app "
                f"has. Add it to [tool.flwr.app.config] in {path}."
            )
    return parse_run_config({**config, **given})


def has_own_server_app(app: Path) -> bool:
    """Whether the app's ServerApp is its own, which may bring a strategy that no key names.

    Raises:
        ConfigError: There is no app.
    """
    _, table = _app_table(app)
    components = table.get("components")
    named = components.get("serverapp") if isinstance(components, dict) else None
    return named != "flower_split.server.app:app"


def _app_table(app: Path) -> tuple[Path, dict[str, object]]:
    """The app's pyproject.toml and its [tool.flwr.app]."""
    path = app.expanduser() / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{app} is no Flower app: {path} cannot be read ({error.strerror}). Give the directory "
            "that holds the app's pyproject.toml, such as simulations/quickstart."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Correct the file.") from error
    table = project.get("tool", {}).get("flwr", {}).get("app")
    if not isinstance(table, dict):
        raise ConfigError(f"{path} has no [tool.flwr.app] section: it is no Flower app.")
    return path, table


def parse_overrides(values: Sequence[str] | None) -> dict[str, Scalar]:
    """The values of ``--run-config`` as flat keys; a later one wins, key by key.

    Flower itself would let a second value replace a whole group of the first (with
    ``data.source=…`` and then ``data.path=…``, the first would be lost), so each is read alone.

    Args:
        values: ``key=value`` pairs, or paths of TOML files.

    Raises:
        ConfigError: A value cannot be read.
    """
    merged: dict[str, Scalar] = {}
    for value in values or []:
        try:
            merged |= parse_config_args([value])
        except (OSError, ValueError, click.ClickException) as error:
            raise ConfigError(
                f"--run-config must hold KEY=VALUE pairs in TOML, separated by spaces, or name a "
                f"TOML file: {error} "
                "Example: --run-config 'num-server-rounds=5 mode=\"frozen\"'."
            ) from error
    return merged
