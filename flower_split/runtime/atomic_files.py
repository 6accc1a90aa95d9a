"""Files that a crash cannot damage: write aside, fsync, rename, fsync the directory."""

import os
import secrets
from pathlib import Path

from flower_split.runtime import failpoints
from flower_split.runtime.secret_files import PRIVATE_FILE


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: readers see the old file or the new one, also after a crash.

    The file is its owner's alone, whatever the umask: it may hold weights.

    Raises:
        OSError: The disk is full or fails; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, PRIVATE_FILE), "wb") as file:
            half = len(content) // 2
            file.write(content[:half])
            failpoints.reach("file.write.half")
            file.write(content[half:])
            file.flush()
            os.fsync(file.fileno())
        failpoints.reach("file.write.before-rename")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    failpoints.reach("file.write.after-rename")
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory as durable as its files."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that were killed have left aside."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)
