"""Resolve run-config paths against the caller's working directory.

The ServerApp and the clients run where Flower puts them, so a relative path would mean another one.
"""

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from flower_split.config import RunConfig, Scalar, resolved_run_config
from flower_split.errors import ConfigError

_FILES = (
    "data.path",
    "data.eval-path",
    "train.client-dir",
    "trunk.token-file",
    "trunk.root-certificates",
    "trunk.client-certificate",
    "trunk.client-key",
    "resume",
    "run-dir",
)
_FILES_OR_NAMES = ("model.name", "data.dataset")  # a path only where there is one of that name
_PACKAGED = "quickstart"


def absolute_paths(config: RunConfig, here: Path) -> dict[str, Scalar]:
    """Return the flat run config with every relative path made absolute.

    Args:
        config: The run's configuration.
        here: The directory that relative paths are meant from.
    """
    values = resolved_run_config(config)
    for key in (*_FILES, *_FILES_OR_NAMES):
        value = str(values[key])
        path = Path(value).expanduser()
        named = key in _FILES_OR_NAMES and (value == _PACKAGED or not (here / path).exists())
        if value and not named:
            values[key] = str(here / path)
    return values


def new_run_directory(here: Path) -> Path:
    """Return a directory for a new run that names none: ``runs/<UTC time>-<id>``."""
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(3)
    return here / "runs" / name


def as_run_config(overrides: Mapping[str, Scalar]) -> str:
    """Return one value for ``--run-config`` with all overrides, as Flower reads them.

    Raises:
        ConfigError: A text holds both kinds of quotes, which Flower cannot read.
    """
    return " ".join(f"{key}={_as_toml(key, value)}" for key, value in overrides.items())


def _as_toml(key: str, value: Scalar) -> str:
    if not isinstance(value, str) or '"' not in value:
        return json.dumps(value, ensure_ascii=False)
    if "'" in value:
        raise ConfigError(
            f"{key} must not hold both single and double quotes, or Flower cannot read it; it is "
            f"{value!r}."
        )
    return f"'{value}'"
