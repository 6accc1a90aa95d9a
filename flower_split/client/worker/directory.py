"""Where a node's ClientApps and its worker meet: a Unix socket in a directory of this user alone.

Each node has a lock file and a socket, named by its id. Whoever holds the lock is the node's worker, or
starts it: the lock goes over with the open file, and is free when the worker has ended, however it did.
The socket is named by way of the open directory, so that the path may be of any length.
"""

import contextlib
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Self

from flower_split.errors import WorkerError
from flower_split.runtime.closing import Closing
from flower_split.runtime.flower_home import flower_home
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY, PRIVATE_FILE

_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
_BACKLOG = 16


class WorkerDirectory(Closing):
    """The directory of this user's workers, held open. Made by :meth:`open`.

    Attributes:
        descriptor: Descriptor of the directory.
        path: Path of the directory, for messages.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """Open the directory, and make it where it is missing.

        Args:
            path: None: that of Flower's home.

        Raises:
            WorkerError: It cannot be made, or is not this user's alone.
        """
        path = path or flower_home() / "flower-split" / "workers"
        try:
            path.mkdir(PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise WorkerError(f"{path} cannot be used: {error.strerror}.") from error
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            os.close(descriptor)
            raise WorkerError(
                f"{path} must be this user's alone; it is user {found.st_uid}'s, with mode "
                f"{stat.S_IMODE(found.st_mode):04o}. Remove it, or run: chmod 700 {path}."
            )
        return cls(descriptor, path)

    def close(self) -> None:
        """Close the directory. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def nodes(self) -> list[int]:
        """Return the nodes that have a socket here, sorted; its worker may have ended."""
        names = (Path(name) for name in os.listdir(self.descriptor))
        return sorted(int(n.stem) for n in names if n.suffix == ".sock" and n.stem.isdigit())

    def lock(self, node: int) -> int | None:
        """Return the node's lock as an open file, or None where another process has it.

        Raises:
            WorkerError: This file system has no locks.
        """
        flags = os.O_RDWR | os.O_CREAT
        try:
            lock = os.open(f"{node}.lock", flags, PRIVATE_FILE, dir_fd=self.descriptor)
        except OSError as error:
            raise WorkerError(f"{self.path}: no lock can be made: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            os.close(lock)
            raise WorkerError(f"{self.path}: no lock can be had: {error.strerror}.") from error
        return lock

    def listen(self, node: int) -> socket.socket:
        """Return a listening socket, in directory of one that was left. Call it with the lock.

        Raises:
            WorkerError: This file system has no sockets.
        """
        self.remove(node)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self._address(node))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise WorkerError(f"{self.path}: no socket can be made: {error.strerror}.") from error
        return listener

    def connect(self, node: int, seconds: float) -> socket.socket | None:
        """Return a connection to the node's worker; None where nobody listens, as far as seen now.

        Raises:
            WorkerError: It is another user's, or cannot be asked.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(seconds)
        try:
            connection.connect(self._address(node))
            check_peer(connection, os.geteuid())
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise WorkerError(f"{self.path}/{node}.sock: {error.strerror or error}.") from error
        except WorkerError:
            connection.close()
            raise
        return connection

    def remove(self, node: int) -> None:
        """Remove the node's socket. Call it with the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{node}.sock", dir_fd=self.descriptor)

    def _address(self, node: int) -> str:
        return f"/proc/self/fd/{self.descriptor}/{node}.sock"


def check_peer(connection: socket.socket, user: int) -> None:
    """Check that the process at the other end is a user's.

    Args:
        connection: A Unix socket.
        user: The user who must own it.

    Raises:
        WorkerError: It is another user's.
    """
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(peer)
    if uid != user:
        raise WorkerError(
            f"process {pid} of user {uid} is at the other end of the socket, and a node's worker and its "
            f"ClientApps run as one user, here {user}."
        )
