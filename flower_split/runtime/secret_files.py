"""Where a secret is: a file with a token or a certificate's private key, or the environment."""

import logging
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from flower_split.errors import ConfigError

logger = logging.getLogger(__name__)

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
TOKEN_VARIABLE = "FLOWER_SPLIT_TRUNK_TOKEN"
"""Environment variable with the coordinator's token, where no file is named."""

_MIN_TOKEN = 16  # characters
_REFUSED = 0o027  # written by the group, or anything by others; a group may read mounted secrets


def check_private(path: str | Path, key: str) -> None:
    """Check that nobody beyond its owner and group can read a file, and its owner alone writes it.

    Args:
        path: Path of the file.
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


def check_not_written_by_others(path: str | Path, key: str) -> None:
    """Check that others cannot write a file that says who may do what.

    Args:
        path: Path of the file.
        key: The command's word for it, for the message.

    Raises:
        ConfigError: They can, or the file cannot be looked at.
    """
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} cannot be read ({error.strerror}). Give a readable file."
        ) from error
    if mode & stat.S_IWOTH:
        raise ConfigError(
            f"{key}: {path} says who may call, and its mode {mode:04o} lets others write it. Run: "
            f"chmod o-w {path}, and look at what it holds."
        )


def read_secret(path: str | Path, key: str) -> str:
    """Return the token of a file: its first line, without the space around it.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is empty.
    """
    return read_secrets(path, key)[0]


def read_secrets(path: str | Path, key: str) -> tuple[str, ...]:
    """Return a file's tokens, one a line; at least one.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is empty.
    """
    check_private(path, key)
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error}). Give a readable file."
        ) from error
    secrets = tuple(line.strip() for line in lines if line.strip())
    if not secrets:
        raise ConfigError(f"{key}: {file} is empty; it must hold the token.")
    return secrets


def check_token(token: str) -> None:
    """Check that a token is long enough that nobody guesses it.

    Raises:
        ConfigError: It is not.
    """
    if len(token) < _MIN_TOKEN:
        raise ConfigError(
            f"the trunk's token must have at least {_MIN_TOKEN} characters; it has {len(token)}. Make "
            "one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'."
        )


def token_in(environment: Mapping[str, str], key: str) -> str:
    """Return the coordinator's token of the environment, for who has named no file.

    Args:
        environment: This process's environment.
        key: The configuration's or the command's word for the file, for the message.

    Raises:
        ConfigError: There is none, or it is too short.
    """
    token = environment.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise ConfigError(
            f"a running trunk asks for its coordinator's token, but {key} names no file, and "
            f"{TOKEN_VARIABLE} is not set in this process's environment (a ServerApp has its "
            "SuperLink's). Name the file that the trunk was started with (flower-split trunk … "
            "--token-file FILE), or set the variable to its first line."
        )
    try:
        check_token(token)
    except ConfigError as error:
        raise ConfigError(f"{TOKEN_VARIABLE}: {error}") from error
    return token


class TokenFile:
    """The tokens of a file, read again when it changes. Thread-safe.

    The first line is what a caller shows; a trunk takes every line. So a token is changed without a
    moment at which neither is taken: the new one above the old in the trunk's file, then alone in the
    callers' files, then alone in the trunk's.

    Args:
        path: The file.
        key: The configuration's or the command's word for it, for messages.

    Raises:
        ConfigError: It cannot be read, others can read it, or a token is too short.
    """

    def __init__(self, path: str | Path, key: str) -> None:
        self._path = Path(path).expanduser()
        self._key = key
        self._lock = threading.Lock()
        self._problem = ""  # with the file, as it was said last
        self._changed = self._looked()
        self._tokens = self._read()

    def tokens(self) -> tuple[str, ...]:
        """Return the tokens as the file has them now.

        Where it is gone, or cannot be used, the former tokens stay and the log says so: a file that is
        deleted is an error, and nothing is made in its place.
        """
        with self._lock:
            try:
                changed = self._looked()
                if changed != self._changed:
                    self._tokens = self._read()
                    self._changed, self._problem = changed, ""
                    logger.info("%s %s was read again", self._key, self._path)
            except ConfigError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    logger.error("the former token stays: %s", error)
            return self._tokens

    def _looked(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise ConfigError(
                f"{self._key}: {self._path} is not there any more, or cannot be looked at "
                f"({error.strerror}). Put it back, with the token that both sides have."
            ) from error
        return found.st_mtime_ns, found.st_ino

    def _read(self) -> tuple[str, ...]:
        tokens = read_secrets(self._path, self._key)
        for token in tokens:
            check_token(token)
        return tokens
