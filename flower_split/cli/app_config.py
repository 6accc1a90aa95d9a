"""An app's directory: its name and its run config, with the command line's overrides."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.cli.overrides import flatten, parse_overrides
from flower_split.config import (
    RunConfig,
    Scalar,
    parse_run_config,
    resolved_run_config,
    run_config_keys,
)
from flower_split.errors import ConfigError

_OWN_SERVER_APP = "flower_split.server.app:app"


@dataclass(frozen=True, slots=True)
class App:
    """What an app's pyproject.toml says of it."""

    project: Path  # the file
    values: Mapping[str, Scalar]  # [tool.flwr.app.config], flat
    server_app: str  # the component, module:attribute
    client_app: str  # the component, module:attribute

    @property
    def has_own_server_app(self) -> bool:
        """Return whether the ServerApp is the app's own, with a strategy that no key may name."""
        return self.server_app != _OWN_SERVER_APP

    def make_importable(self) -> None:
        """Put the app's directory first on the import path, as Flower does where the app runs.

        The run config may name classes of the app's own, such as its data source.
        """
        folder = str(self.project.parent.resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)

    def config(self, overrides: Mapping[str, Scalar]) -> RunConfig:
        """Return the run config that ``flwr run APP --run-config …`` would use, checked.

        Raises:
            ConfigError: A key or value is wrong, or the app lacks a key that is overridden.
        """
        self.check_keys(overrides)
        return parse_run_config({**self.values, **overrides})

    def check_keys(self, overrides: Mapping[str, Scalar]) -> None:
        """Check that Flower can override these keys: it takes only those that the app has.

        Raises:
            ConfigError: It cannot; an unknown key is told with its nearest name.
        """
        for key, value in overrides.items():
            if key not in self.values:
                parse_run_config({key: value})
                raise ConfigError(
                    f"{key!r} may be set, but Flower overrides only keys that the app has. Add it to "
                    f"[tool.flwr.app.config] in {self.project}."
                )

    def overrides_for(self, config: RunConfig) -> dict[str, Scalar]:
        """Return the overrides with which this app runs with ``config``.

        Raises:
            ConfigError: The app lacks a key whose value is not the default.
        """
        mine = {**run_config_keys(), **self.values}
        wanted = resolved_run_config(config)
        overrides = {key: value for key, value in wanted.items() if mine.get(key) != value}
        self.check_keys(overrides)
        return overrides


def load_app(path: Path) -> App:
    """Read the app in the directory ``path``.

    Raises:
        ConfigError: There is none, or its pyproject.toml is wrong.
    """
    project = path.expanduser() / "pyproject.toml"
    table = _app_table(path, project)
    section = table.get("config", {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"{project}: [tool.flwr.app.config] must be a table of keys; it is {section!r}."
        )
    components = table.get("components")
    named = components if isinstance(components, dict) else {}
    return App(project, flatten(section), str(named.get("serverapp")), str(named.get("clientapp")))


def load_app_config(path: Path, overrides: Sequence[str] | None) -> RunConfig:
    """Return the checked run config of the app in ``path`` with ``--run-config`` values.

    Raises:
        ConfigError: There is no app, or a key or value is wrong.
    """
    return load_app(path).config(parse_overrides(overrides))


def _app_table(app: Path, path: Path) -> dict[str, object]:
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
        raise ConfigError(
            f"{path} has no [tool.flwr.app] section: it is no Flower app. Name another directory."
        )
    return table
