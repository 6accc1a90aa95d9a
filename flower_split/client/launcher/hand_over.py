"""What Flower starts as ``flwr-clientapp``: have the launcher fork that process, and end as it ends.

Run by path with ``python -IS``, as ``hand_over.py FOLDER COMMAND ARGUMENTS…``, so it imports nothing of
this package: a Python that has loaded six modules is there in hundredths of a second. Where the launcher
does not take the start, this process becomes ``COMMAND`` itself, Flower's own.
"""

import json
import os
import socket
import struct
import sys
from typing import NoReturn

SOCKET = "launcher.sock"
"""In the launcher's folder."""

_LENGTH = struct.Struct("!I")
_SECONDS = 60.0  # for the launcher's word that it has taken the start


def main(argv: list[str]) -> int:
    """Return the exit code of the process that the launcher has forked; or become ``COMMAND``."""
    folder, command, arguments = argv[1], argv[2], argv[3:]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_SECONDS)
    start = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(start).encode()
    try:
        connection.connect(address_in(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)))
        socket.send_fds(connection, [_LENGTH.pack(len(text))], [0, 1, 2])
        connection.sendall(text)
        taken = connection.recv(1) == b"y"
    except OSError:
        taken = False
    if not taken:
        connection.close()
        _become(command, arguments)
    connection.settimeout(None)  # until the process has ended, or the launcher has
    code = connection.recv(1)
    return code[0] if code else 1


def address_in(folder: int) -> str:
    """Return the socket's address by way of its open folder, so that the path may be of any length."""
    return f"/proc/self/fd/{folder}/{SOCKET}"


def _become(command: str, arguments: list[str]) -> NoReturn:
    os.execv(command, [command, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
