"""A small HTTP proxy for tests: lets CONNECT through to one server, whatever host is asked for."""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator

_JOIN_SECONDS = 10.0


class ConnectProxy:
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
        self._target, self._refuse = target, refuse
        self._authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        at = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"http://{user}@{at}" if user else f"http://{at}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections; those that are open end with their ends."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(_JOIN_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = link.recv(4096)
            if not chunk:
                link.close()
                return
            head += chunk
        lines = head.decode("latin-1").split("\r\n")
        self.asked.append(lines[0])
        status = self._refuse
        if self._authorization and f"Proxy-Authorization: {self._authorization}" not in lines:
            status = "407 Proxy Authentication Required"
        if status:
            link.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
            link.close()
            return
        with link, socket.create_connection(("127.0.0.1", self._target)) as server:
            link.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pass, args=(server, link), daemon=True)
            back.start()
            _pass(link, server)
            back.join(_JOIN_SECONDS)


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def connect_proxy(target: int, user: str = "", refuse: str = "") -> Iterator[ConnectProxy]:
    """Yield a proxy that ends with the block."""
    proxy = ConnectProxy(target, user, refuse)
    try:
        yield proxy
    finally:
        proxy.close()
