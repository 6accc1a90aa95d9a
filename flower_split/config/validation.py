"""Rules that values keep, with the errors that say so."""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from flower_split.errors import ConfigError

Scalar = bool | int | float | str
"""A value of Flower's run config."""

ENVIRONMENT, NO_PROXY = "environment", "none"
"""Values of ``trunk.proxy`` that are no URL."""
_PLUG_IN_NAME = re.compile(r"[\w.-]+(:[A-Za-z_][\w.]*)?")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}; it is {value!r}.")


def plug_in_name(key: str, value: str) -> None:
    """Refuse what can be no name of a plug-in; whether there is one is for its registry to say."""
    if not _PLUG_IN_NAME.fullmatch(value):
        raise ConfigError(
            f'{key} must be a name of letters, digits, "-", "_" and ".", or an import path '
            f'"module:object"; it is {value!r}.'
        )


def check_address(key: str, value: str) -> None:
    """Refuse what is not ``host:port``."""
    host, _, port = value.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{key} must be host:port; it is {value!r}.")


def check_proxy(key: str, value: str) -> None:
    """Refuse what is no HTTP proxy; the value is not repeated, for it may hold a password."""
    if value in (ENVIRONMENT, NO_PROXY):
        return
    try:
        parts = urlsplit(value)
        good = (
            parts.scheme == "http" and parts.hostname and parts.port and not parts.path.strip("/")
        )
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f'{key} must be "{ENVIRONMENT}", "{NO_PROXY}" or "http://host:port", an HTTP proxy that '
            "lets CONNECT through."
        )


def at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a value below ``minimum``, and NaN."""
    if not value >= minimum:
        raise ConfigError(f"{key} must be at least {minimum}; it is {value!r}.")


def above(key: str, value: float, bound: float) -> None:
    """Refuse a value that is not above ``bound``."""
    if not value > bound:
        raise ConfigError(f"{key} must be above {bound}; it is {value!r}.")


def share(key: str, value: float, *, zero: bool = False) -> None:
    """Refuse a value outside (0, 1], or [0, 1] with ``zero``."""
    if not (0 < value <= 1 or (zero and value == 0)):
        raise ConfigError(f"{key} must be in {'[' if zero else '('}0, 1]; it is {value!r}.")


def pattern(key: str, text: str) -> dict[str, float]:
    """Read ``"name=value, name=value"`` as a mapping."""
    values: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f'{key} must read "name=value, name=value"; {item!r} in it does not.'
            ) from None
        above(key, values[name.strip()], 0)
    return values


def longest(values: Mapping[str, float], module: str) -> float | None:
    """Return the value of the longest name that ``module`` is, or ends with after a dot."""
    names = [name for name in values if module == name or module.endswith("." + name)]
    return values[max(names, key=len)] if names else None


def kebab(name: str) -> str:
    """Return a field's name as its key is spelled."""
    return name.replace("_", "-")
