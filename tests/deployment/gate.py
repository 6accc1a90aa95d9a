"""A link between two machines that can be cut: a TCP forwarder with a switch."""

import contextlib
import socket
import threading

_JOIN_SECONDS = 10.0


class Gate:
    """Forwards a port of loopback to another while it is open.

    Attributes:
        port: Where it listens.

    Args:
        target: Port that connections are passed on to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()  # guards what follows
        self._links: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End every connection, and refuse new ones."""
        self._open.clear()
        with self._lock:
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._open.set()

    def close(self) -> None:
        """End."""
        self.cut()
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
        with link:
            if not self._open.is_set():
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with server:
                with self._lock:
                    self._links |= {link, server}
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
