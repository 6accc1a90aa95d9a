"""``--run-config`` values, read as Flower reads them but without importing it.

Flower's own reader takes seconds to import on a busy machine, lets a second value replace a whole
group of the first (``data.source=…``, then ``data.path=…``), and calls a key that is given twice an
invalid format.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from flower_split.config import Scalar
from flower_split.errors import ConfigError

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's
_EXAMPLE = "Example: --run-config 'num-server-rounds=5 mode=\"frozen\"'."


def parse_overrides(values: Sequence[str] | None) -> dict[str, Scalar]:
    """Return the values of ``--run-config`` as flat keys; a later one wins, key by key.

    Args:
        values: ``key=value`` pairs, or paths of TOML files.

    Raises:
        ConfigError: A value cannot be read, or holds a key twice; names the key.
    """
    merged: dict[str, Scalar] = {}
    for value in values or []:
        merged |= _from_file(Path(value)) if value.endswith(".toml") else _from_pairs(value)
    return merged


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Return a TOML table as flat keys with dots between groups.

    Raises:
        ConfigError: A value is no bool, int, float or text.
    """
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict):
            flat |= flatten(value, key + ".")
        elif isinstance(value, bool | int | float | str):
            flat[key] = value
        else:
            raise ConfigError(
                f"{key} must be a bool, a number or a text; it is {value!r}. A list is written as "
                "one text, as the key's documentation says."
            )
    return flat


def _from_file(path: Path) -> dict[str, Scalar]:
    try:
        return flatten(tomllib.loads(path.expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"--run-config {path} cannot be read: {error.strerror}. Correct the path."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--run-config {path} is not valid TOML: {error}. Correct the file."
        ) from error


def _from_pairs(text: str) -> dict[str, Scalar]:
    pairs = _PAIR.findall(text)
    left = _PAIR.sub("", text).split()
    if left:
        raise ConfigError(
            f"--run-config must hold KEY=VALUE pairs, separated by spaces, or name a TOML file; "
            f"{left[0]!r} is no pair. {_EXAMPLE}"
        )
    flat: dict[str, Scalar] = {}
    for key, value in pairs:
        try:
            read = flatten(tomllib.loads(f"{key} = {value}"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"--run-config: {key} has a value that is not TOML: {value} (texts need quotes). "
                f"{_EXAMPLE}"
            ) from error
        for name, item in read.items():
            if name in flat:
                raise ConfigError(
                    f"--run-config gives {name} twice in one value: {flat[name]!r} and {item!r}. "
                    "Leave one of them out."
                )
            flat[name] = item
    return flat
