"""SHA-256 of weight files, whole, computed once for each state of a file.

A large file takes seconds to read, and every Flower message of a deployment is a process of its own.
The digest is therefore kept in a file beside the checkpoint, or, where that cannot be written, in the
user's cache directory; by size, modification and change time, and inode. A file that was changed a
moment ago is not kept: a second change could leave all of these as they are.
"""

import functools
import hashlib
import json
import os
import time
from pathlib import Path

from flower_split.runtime.atomic_files import write_atomically

CACHE_FILE = ".flower-split-digests.json"
_KEPT_FROM = 64 << 20  # bytes; smaller files are read faster than a cache is looked up
_BLOCK = 8 << 20  # bytes
_SETTLED_SECONDS = 2.0  # since a file's last change; file systems' clocks are coarse


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file's size and whole content.

    Raises:
        OSError: It cannot be read.
    """
    path = path.resolve()
    return _digest(path, _state_of(path))


@functools.lru_cache(maxsize=256)
def _digest(path: Path, state: str) -> bytes:
    if int(state.partition(" ")[0]) < _KEPT_FROM:
        return _hashed(path)
    for place in _places(path):
        kept = _read(place).get(path.name)
        if kept is not None and kept.get("state") == state and "sha256" in kept:
            return bytes.fromhex(kept["sha256"])
    digest = _hashed(path)
    if _state_of(path) == state and time.time() - path.stat().st_ctime > _SETTLED_SECONDS:
        _keep(path, {"state": state, "sha256": digest.hex()})
    return digest


def _state_of(path: Path) -> str:
    """Return what changes whenever the file's content does: its size first."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _hashed(path: Path) -> bytes:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def _places(path: Path) -> tuple[Path, Path]:
    """Return where the digests of a file's directory may be kept, the preferred place first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
    return path.parent / CACHE_FILE, home / "flower-split" / f"digests-{name}.json"


def _read(place: Path) -> dict[str, dict[str, str]]:
    """Return the digests that are kept by file name; a file that is absent or damaged holds none."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return {str(name): dict(entry) for name, entry in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _keep(path: Path, entry: dict[str, str]) -> None:
    """Keep one digest in the first place that takes it; without one, it is computed again."""
    for place in _places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            kept = {**_read(place), path.name: entry}
            write_atomically(place, json.dumps(kept, indent=1).encode())
            return
        except OSError:
            continue
