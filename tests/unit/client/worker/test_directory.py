"""Where ClientApps and workers meet is their user's alone, and what comes there is checked."""

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_split.client.worker import frames
from flower_split.client.worker.directory import WorkerDirectory, check_peer
from flower_split.client.worker.frames import Closed, Frame
from flower_split.errors import WorkerError


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[WorkerDirectory]:
    with WorkerDirectory.open(tmp_path / "a" / ("long" * 40) / "workers") as directory:
        yield directory


def test_directory_is_made_for_its_user_alone_and_socket_paths_may_be_long(
    directory: WorkerDirectory,
) -> None:
    assert directory.path.stat().st_mode & 0o777 == 0o700
    with directory.listen(7) as listener:
        connection = directory.connect(7, 1.0)
        assert connection is not None
        with connection, listener.accept()[0] as other:
            frames.send(
                connection, Frame("hello", {"a": 1, "b": ("x", "y")}, (b"12", b"")), 1, "it"
            )
            assert frames.receive(other, 1, "it") == Frame(
                "hello", {"a": 1, "b": ("x", "y")}, (b"12", b"")
            )


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_directory_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "workers"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(
        WorkerError, match=f"must be this user's alone; .* mode {mode:04o}.*chmod 700"
    ):
        WorkerDirectory.open(path)


def test_link_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "workers").symlink_to("real")
    with pytest.raises(WorkerError, match="cannot be used"):
        WorkerDirectory.open(tmp_path / "workers")


def test_lock_is_one_processs_until_its_file_is_closed(directory: WorkerDirectory) -> None:
    lock = directory.lock(7)
    assert lock is not None
    assert directory.lock(7) is None
    other = directory.lock(8)
    assert other is not None
    os.close(other)
    os.close(lock)
    again = directory.lock(7)
    assert again is not None
    os.close(again)


def test_nobody_listens(directory: WorkerDirectory) -> None:
    assert directory.connect(7, 1.0) is None
    directory.listen(7).close()  # leaves its file
    assert directory.connect(7, 1.0) is None


def test_peer_of_another_user_is_refused() -> None:
    one, other = socket.socketpair()
    with one, other:
        check_peer(one, os.geteuid())
        with pytest.raises(WorkerError, match=f"of user {os.geteuid()} .*here {os.geteuid() + 1}"):
            check_peer(one, os.geteuid() + 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_caller_of_another_user_is_refused_even_past_the_directory() -> None:
    # A name without a file, which everybody reaches, whoever may enter this test's directories.
    path = f"\0flower-split-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(20)
        become = "import os, socket; os.setgroups([]); os.setuid(65534)"
        script = f"{become}; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); input()"
        stranger = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
        try:
            with listener.accept()[0] as connection:
                with pytest.raises(WorkerError, match="of user 65534"):
                    check_peer(connection, os.geteuid())
        finally:
            stranger.communicate(b"\n", timeout=20)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (struct.pack("!I", 1 << 30), "1073741824 bytes, and 1048576 at most"),
        (struct.pack("!I", 2) + b"[]", "is no frame"),
        (struct.pack("!I", 2) + b"{]", "is no frame"),
        (struct.pack("!I", 44) + b'{"kind": "a", "fields": {}, "blobs": [1e300]}', "is no frame"),
    ],
)
def test_what_is_no_frame_is_refused_before_anything_is_allocated(sent: bytes, said: str) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(sent)
        with pytest.raises(WorkerError, match=said):
            frames.receive(other, 1.0, "a test")


def test_wait_has_an_end_that_says_what_was_waited_for() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"\0\0")  # half of a length
        with pytest.raises(WorkerError, match=r"a test did not come within 0\.05 s"):
            frames.receive(other, 0.05, "a test")
        with pytest.raises(WorkerError, match=r"much was not taken within 0\.05 s"):
            frames.send(other, Frame("much", {}, (bytes(1 << 24),)), 0.05, "much")


def test_other_side_that_is_gone_is_said() -> None:
    one, other = socket.socketpair()
    with other:
        one.close()
        with pytest.raises(Closed, match="a test: the connection was closed"):
            frames.receive(other, 1.0, "a test")
        with pytest.raises(Closed, match="it: the connection was closed"):
            frames.send(other, Frame("hello"), 1.0, "it")
