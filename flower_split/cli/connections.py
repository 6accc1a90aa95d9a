"""Which SuperLink a command means: a connection of Flower's config.toml, or one of its own.

Flower's file is read here, without importing Flower, so that the command's first checks are quick.
"""

import tomllib
from dataclasses import dataclass

from flower_split.errors import ConfigError
from flower_split.runtime.flower_home import flower_home

_LOCAL = (":local:", ":local-in-memory:")  # Flower's words for "start one on this machine"
_FLOWERS_OWN = {"local": ":local:", "supergrid": "api.flower.ai"}  # without a file


@dataclass(frozen=True, slots=True)
class Connection:
    """One SuperLink."""

    name: str  # empty: Flower's default
    address: str
    insecure: bool = False  # without TLS
    root_certificates: str = ""  # PEM file of its CA; empty: the system's

    @property
    def is_local(self) -> bool:
        """Return whether runs are simulated on this machine, by a SuperLink that is started."""
        return self.address in _LOCAL


LOCAL = Connection("", _LOCAL[0])
"""No SuperLink at all: everything is on this machine."""


def find_connection(name: str | None) -> Connection:
    """Return the connection of that name, or Flower's default.

    Raises:
        ConfigError: There is none of that name, or Flower's file is damaged.
    """
    path = flower_home() / "config.toml"
    table: dict[str, object] = {"default": "local"}
    table |= {known: {"address": address} for known, address in _FLOWERS_OWN.items()}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
        table = found if isinstance(found, dict) else {}
    except FileNotFoundError:
        pass
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Flower's {path} cannot be read: {error}. Correct the file.") from error
    wanted = name or table.get("default")
    section = table.get(wanted) if isinstance(wanted, str) else None
    if not isinstance(section, dict):
        known = ", ".join(key for key, value in table.items() if isinstance(value, dict))
        raise ConfigError(
            f"Flower's {path} has no SuperLink connection {wanted!r} (it has: {known or 'none'}). Add "
            f"a section [superlink.{wanted}] with its address, or leave the name out."
        )
    # A section with nothing but options is Flower's former way to say "local".
    address = section.get("address") or (":local:" if "options" in section else "")
    return Connection(
        name or "",
        str(address),
        insecure=section.get("insecure") is True,
        root_certificates=str(section.get("root-certificates") or ""),
    )
