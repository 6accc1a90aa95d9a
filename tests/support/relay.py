"""A TCP relay on loopback, of which kinds decide what passes: a link that can be cut, an HTTP proxy."""

import contextlib
import socket
import threading

_JOIN_SECONDS = 10.0


class Relay:
    """Passes every connection on that :meth:`admit` lets through, on threads of their own.

    Attributes:
        port: Where it listens.

    Args:
        target: Port on loopback that connections are passed on to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()  # guards what follows
        self._links: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def admit(self, link: socket.socket) -> bytes | None:
        """Return what a connection is told first, where it is passed on; None: it is closed."""
        return b""

    def end_links(self) -> None:
        """End every connection that is passed on."""
        with self._lock:
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections, and end those that are open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.end_links()
        self._thread.join(_JOIN_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link:
            first = self.admit(link)
            if first is None:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with server:
                with self._lock:
                    self._links |= {link, server}
                link.sendall(first)
                back = threading.Thread(target=_pass, args=(server, link), daemon=True)
                back.start()
                _pass(link, server)
                back.join(_JOIN_SECONDS)
                with self._lock:
                    self._links -= {link, server}


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
