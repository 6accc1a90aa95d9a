"""A small HTTP proxy for tests: lets CONNECT through to one server, whatever host is asked for."""

import base64
import contextlib
import socket
from collections.abc import Iterator

from tests.support.relay import Relay


class ConnectProxy(Relay):
    """Listens on loopback, on a free port.

    Attributes:
        asked: The first line of every request, in order.
        url: Its own.

    Args:
        target: Port on loopback that every connection is passed on to.
        user: ``name:password`` that a request must give; empty: none.
        refuse: Status that answers every request; empty: it is let through.
    """

    def __init__(self, target: int, user: str = "", refuse: str = "") -> None:
        self.asked: list[str] = []
        self._refuse = refuse
        self._authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        super().__init__(target)
        at = f"127.0.0.1:{self.port}"
        self.url = f"http://{user}@{at}" if user else f"http://{at}"

    def admit(self, link: socket.socket) -> bytes | None:
        """Read the request; answer one that is refused."""
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = link.recv(4096)
            if not chunk:
                return None
            head += chunk
        lines = head.decode("latin-1").split("\r\n")
        self.asked.append(lines[0])
        status = self._refuse
        if self._authorization and f"Proxy-Authorization: {self._authorization}" not in lines:
            status = "407 Proxy Authentication Required"
        if status:
            link.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
            return None
        return b"HTTP/1.1 200 Connection established\r\n\r\n"


@contextlib.contextmanager
def connect_proxy(target: int, user: str = "", refuse: str = "") -> Iterator[ConnectProxy]:
    """Yield a proxy that ends with the block."""
    proxy = ConnectProxy(target, user, refuse)
    try:
        yield proxy
    finally:
        proxy.close()
