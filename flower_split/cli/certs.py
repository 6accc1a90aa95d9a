"""``flower-split certs``: a development CA, and what it signs for a server and for clients.

For trying things out, and for federations among people who know each other. An organisation with a
CA of its own takes certificates from there; nothing else changes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flower_split.cli.certificates import (
    Authority,
    new_authority,
    node_key,
    private_pem,
    public_pem,
    signed_client,
    signed_server,
)
from flower_split.errors import ConfigError
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY, PRIVATE_FILE, check_private

_PUBLIC_FILE = 0o644
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CertsCommand:
    """What the command line asks for."""

    directory: Path
    hosts: Sequence[str] = ()  # DNS names and addresses of the server, beside this machine's own
    clients: Sequence[str] = ()  # names
    days: int = 90  # until the certificates end

    def __post_init__(self) -> None:
        """Check the values."""
        if not 1 <= self.days <= 825:
            raise ConfigError(f"--days must be from 1 to 825; it is {self.days}.")
        for name in self.clients:
            if not name.replace("-", "").replace("_", "").isalnum() or name in ("ca", "server"):
                raise ConfigError(
                    "--client must be letters, digits, hyphens and underscores, and not ca or server, "
                    f"as it names files; it is {name!r}."
                )


def write_certificates(command: CertsCommand) -> int:
    """Write what is asked for and not there yet; a CA that is there signs again.

    Raises:
        ConfigError: The directory cannot be written, the CA in it is damaged or open to others, or a
            file is there already and would be replaced.
    """
    directory = command.directory.expanduser()
    try:
        directory.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        authority, is_new = _authority(directory, command.days)
        wanted: dict[str, bytes] = {}
        if is_new or command.hosts:
            hosts = [*_LOCAL_HOSTS, *command.hosts]
            certificate, key = signed_server(authority, hosts, command.days)
            wanted |= {"server.crt": public_pem(certificate), "server.key": private_pem(key)}
        for name in command.clients:
            certificate, key = signed_client(authority, name, command.days)
            private, public = node_key()
            wanted |= {f"{name}.crt": public_pem(certificate), f"{name}.key": private_pem(key)}
            wanted |= {f"{name}.node": private, f"{name}.node.pub": public}
        if is_new:
            wanted |= {
                "ca.crt": public_pem(authority.certificate),
                "ca.key": private_pem(authority.key),
            }
        _write(directory, wanted)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}. Name another one.") from error
    print(f"wrote {', '.join(sorted(wanted)) or 'nothing'} in {directory}")
    print(f"they end {authority.ends(command.days):%Y-%m-%d}; ca.key stays on this machine")
    return 0


def _authority(directory: Path, days: int) -> tuple[Authority, bool]:
    """Return the directory's CA, and whether it was made now.

    Raises:
        ConfigError: Half of it is there, it is damaged, or others can read its key.
    """
    certificate, key = directory / "ca.crt", directory / "ca.key"
    if not certificate.exists() and not key.exists():
        return new_authority(days), True
    if not (certificate.exists() and key.exists()):
        raise ConfigError(
            f"a CA is ca.crt and ca.key; {directory} holds only one of them. Put the other one back, or "
            "name an empty directory."
        )
    check_private(key, "certs")
    try:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("its key is not of the kind that this command makes")
        return Authority(x509.load_pem_x509_certificate(certificate.read_bytes()), loaded), False
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the CA in {directory} cannot be read ({error}). Name an empty directory for a new one."
        ) from error


def _write(directory: Path, wanted: dict[str, bytes]) -> None:
    """Write all files, or none where one is there already.

    Raises:
        ConfigError: One is there.
        OSError: The disk does not take them.
    """
    for name in wanted:
        if (directory / name).exists():
            raise ConfigError(
                f"{directory / name} is there already, and machines may be using it. Remove it first if "
                "it is to be replaced."
            )
    for name, content in wanted.items():
        public = name.endswith((".crt", ".pub"))
        mode = _PUBLIC_FILE if public else PRIVATE_FILE
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(directory / name, flags, mode), "wb") as file:
            file.write(content)
