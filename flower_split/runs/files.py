"""Plain files of a run directory, read and checked without torch, so that a command answers at once."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import ConfigError, RunDirectoryError
from flower_split.runtime.atomic_files import write_atomically
from flower_split.runtime.json_text import read_json_text

Json: TypeAlias = "bool | int | float | str | None | Sequence[Json] | Mapping[str, Json]"

FLOWER_FOLDER = "flower"
"""In the run directory: the local SuperLink that ``flower-split run`` starts, and its log."""


def check_new_directory(path: Path) -> None:
    """Check that a new run may use ``path``: it is missing, or holds nothing but Flower's folder.

    Raises:
        RunDirectoryError: It holds files, or is none.
    """
    try:
        taken = path.exists() and any(item.name != FLOWER_FOLDER for item in path.iterdir())
    except OSError as error:
        raise RunDirectoryError(
            f"the run directory {path} cannot be read: {error.strerror}. Name another one in run-dir."
        ) from error
    if taken:
        raise RunDirectoryError(
            f"a new run needs an empty directory; {path} holds files. Name another one in run-dir, "
            "leave run-dir empty, or go on with the run there: flower-split run APP --resume "
            f"{path}"
        )


def read_config(path: Path) -> RunConfig:
    """Return the configuration of the run in the directory ``path``.

    Raises:
        RunDirectoryError: It is no run directory, or its config is damaged; names the file.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"there is no run directory {path}. Check the path.")
    values = read_json(path / "config.json")
    try:
        return parse_run_config(values)  # type: ignore[arg-type]  # it checks every type
    except ConfigError as error:
        raise RunDirectoryError(
            f"{path / 'config.json'} is no run config of this version: {error} "
            "Open the run with the version in its versions.json."
        ) from error


def read_json(path: Path) -> dict[str, Json]:
    """Return the JSON object in ``path``.

    Raises:
        RunDirectoryError: The file is missing or damaged, or holds something else.
    """
    try:
        content = read_json_text(path.read_bytes())
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path} is missing: {path.parent} is no run directory, or its run did not get that "
            "far. Give the directory that the run printed."
        ) from error
    except ValueError as error:
        raise RunDirectoryError(
            f"{path} is damaged: {error}. Restore the file, or run again."
        ) from error
    if not isinstance(content, dict):
        raise RunDirectoryError(
            f"{path} must hold a JSON object; it holds a {type(content).__name__}. "
            "Restore the file, or run again."
        )
    return content


def write_json(path: Path, content: Mapping[str, Json]) -> None:
    """Write ``content`` to ``path`` so that no reader sees half of it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def finite(value: Json) -> Json:
    """Return ``value`` with null for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
