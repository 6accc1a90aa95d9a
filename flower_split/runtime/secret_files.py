"""Files that hold a secret: a token, or the private key of a certificate."""

import stat
from pathlib import Path

from flower_split.errors import ConfigError

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
_REFUSED = 0o027  # written by the group, or anything by others; a group may read mounted secrets


def check_private(path: str | Path, key: str) -> None:
    """Check that nobody beyond its owner and group can read a file, and its owner alone writes it.

    Args:
        path: Of the file.
        key: The configuration's or the command's word for it, for the message.

    Raises:
        ConfigError: Others may, or the file cannot be looked at.
    """
    file = Path(path).expanduser()
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error.strerror}). Give a readable file."
        ) from error
    if mode & _REFUSED:
        raise ConfigError(
            f"{key}: {file} holds a secret, and its mode {mode:04o} lets others at it. Run: chmod 600 "
            f"{file}. If others had access to this machine, make a new secret."
        )


def read_secret(path: str | Path, key: str) -> str:
    """Return a secret's text without the space around it.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is empty.
    """
    check_private(path, key)
    file = Path(path).expanduser()
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error}). Give a readable file."
        ) from error
    if not secret:
        raise ConfigError(f"{key}: {file} is empty; it must hold the token.")
    return secret
