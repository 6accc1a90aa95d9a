"""A link between two machines that can be cut: a TCP relay with a switch."""

import socket
import threading

from tests.support.relay import Relay


class Gate(Relay):
    """Forwards a port of loopback to another while it is open."""

    def __init__(self, target: int) -> None:
        self._open = threading.Event()
        self._open.set()
        super().__init__(target)

    def admit(self, link: socket.socket) -> bytes | None:
        """Let a connection through while the link is whole."""
        return b"" if self._open.is_set() else None

    def cut(self) -> None:
        """End every connection, and refuse new ones."""
        self._open.clear()
        self.end_links()

    def mend(self) -> None:
        """Let connections through again."""
        self._open.set()
