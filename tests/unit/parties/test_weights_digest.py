"""Digests of weight files: whole, kept by the file's state, never stale."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from flower_split.parties import weights_digest
from flower_split.parties.weights_digest import CACHE_FILE, file_digest

SIZE = 1 << 16


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, and was not changed a moment ago."""
    monkeypatch.setattr(weights_digest, "_KEPT_FROM", SIZE)
    monkeypatch.setattr(weights_digest, "_SETTLED_SECONDS", -60.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(SIZE))
    return file


def expected(file: Path) -> bytes:
    """By hand: SHA-256 of the size in decimal, then the content."""
    return hashlib.sha256(str(file.stat().st_size).encode() + file.read_bytes()).digest()


def forget() -> None:
    """Have the next call be that of a new process."""
    weights_digest._digest.cache_clear()


def test_every_byte_of_a_file_counts(large: Path) -> None:
    before = file_digest(large)
    assert before == expected(large)
    for position in range(0, SIZE, SIZE // 97):
        content = bytearray(SIZE)
        content[position] = 1
        large.write_bytes(content)
        assert file_digest(large) not in (before, b"")
    assert file_digest(large) == expected(large)


def test_digest_is_kept_beside_the_checkpoint_and_not_computed_again(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_digest(large)
    assert (large.parent / CACHE_FILE).is_file()
    forget()
    monkeypatch.setattr(weights_digest, "_hashed", lambda path: pytest.fail("it was read again"))
    assert file_digest(large) == digest


def test_change_of_the_same_size_and_time_is_noticed(large: Path) -> None:
    status = large.stat()
    file_digest(large)
    forget()
    large.write_bytes(b"x" * SIZE)
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and tar do
    assert file_digest(large) == expected(large)


def test_file_that_another_took_the_place_of_is_noticed(large: Path) -> None:
    file_digest(large)
    forget()
    other = large.with_name("other")
    other.write_bytes(b"y" * SIZE)
    os.replace(other, large)
    assert file_digest(large) == expected(large)


def test_digest_goes_to_the_users_cache_where_the_checkpoint_cannot_be_written(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = weights_digest.write_atomically

    def refuse(path: Path, content: bytes) -> None:
        if path.parent == large.parent:
            raise PermissionError("read-only file system")
        write(path, content)

    monkeypatch.setattr(weights_digest, "write_atomically", refuse)
    digest = file_digest(large)
    assert not (large.parent / CACHE_FILE).exists()
    assert len(list((tmp_path / "cache" / "flower-split").glob("digests-*.json"))) == 1
    forget()
    monkeypatch.setattr(weights_digest, "_hashed", lambda path: pytest.fail("it was read again"))
    assert file_digest(large) == digest


@pytest.mark.parametrize("content", ["", "[]", '{"model.safetensors": 3}', "{"])
def test_damaged_cache_is_passed_over(large: Path, content: str) -> None:
    (large.parent / CACHE_FILE).write_text(content)
    assert file_digest(large) == expected(large)
    assert json.loads((large.parent / CACHE_FILE).read_text())["model.safetensors"]["sha256"]


def test_file_that_was_changed_a_moment_ago_is_not_kept(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_digest, "_SETTLED_SECONDS", 3600.0)
    assert time.time() - large.stat().st_ctime < 3600
    assert file_digest(large) == expected(large)
    assert not (large.parent / CACHE_FILE).exists()
