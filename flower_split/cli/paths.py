"""Paths of a run config, as they are meant where the command is given.

Flower's local SuperLink keeps the directory of its first caller, so a relative path in a run config
means some other directory as soon as the SuperLink was started elsewhere.
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
    "train.client-dir",
    "trunk.token-file",
    "trunk.root-certificates",
    "resume",
    "run-dir",
)
_FILES_OR_NAMES = ("model.name", "data.dataset")  # a path only where there is one of that name
_PACKAGED = "quickstart"


def path_overrides(config: RunConfig, here: Path) -> dict[str, str]:
    """Run-config keys whose relative paths must be made absolute, and the new run's directory.

    Args:
        config: The run's configuration.
        here: The directory that relative paths are meant from.
    """
    values = resolved_run_config(config)
    overrides: dict[str, str] = {}
    for key in (*_FILES, *_FILES_OR_NAMES):
        value = str(values[key])
        path = Path(value).expanduser()
        named = key in _FILES_OR_NAMES and (value == _PACKAGED or not (here / path).exists())
        if value and not named and str(here / path) != value:
            overrides[key] = str(here / path)
    if not config.run_dir and not config.resume:
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(3)
        overrides["run-dir"] = str(here / "runs" / name)
    return overrides


def as_run_config(overrides: Mapping[str, Scalar]) -> str:
    """A value for ``--run-config``: all overrides in one, as Flower reads them.

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
