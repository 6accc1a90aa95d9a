"""A TCP proxy in this process that a test lets fail: cut after so many bytes, delay, or refuse."""

import socket
import threading
from dataclasses import dataclass

_CHUNK = 65536


@dataclass(slots=True)
class Fault:
    """What happens to connections until it has happened ``times`` times.

    Args:
        kind: ``cut`` ends a connection after ``after_bytes`` in either direction; ``delay`` holds
            its bytes back once for ``seconds``; ``refuse`` ends a new connection at once.
        after_bytes: From the fault's beginning, over one direction of one connection.
        seconds: Of a delay.
        times: How often it happens.
    """

    kind: str
    after_bytes: int = 0
    seconds: float = 0.0
    times: int = 1


class Proxy:
    """Forwards ``127.0.0.1:port`` to ``target``; serves from its construction until :meth:`close`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.fired: dict[str, int] = {}
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def inject(self, fault: Fault) -> None:
        """Switch a fault on; it replaces one that has not happened yet."""
        with self._lock:
            self._fault = fault

    def close(self) -> None:
        """Stop serving and end every connection."""
        self._closed.set()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                connection.close()

    def _take(self, kind: str, passed: int = 0) -> Fault | None:
        """The fault, if it is of this kind and due; counts it as fired."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.kind != kind or passed < fault.after_bytes:
                return None
            fault.times -= 1
            if fault.times <= 0:
                self._fault = None
            self.fired[kind] = self.fired.get(kind, 0) + 1
            return fault

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._take("refuse"):
                client.close()
                continue
            try:
                server = socket.create_connection(self.target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        passed, watched = 0, None
        try:
            while data := source.recv(_CHUNK):
                if watched is not self._fault:  # a new fault counts from here
                    passed, watched = 0, self._fault
                passed += len(data)
                if self._take("cut", passed):
                    break
                fault = self._take("delay", passed)
                if fault is not None:
                    self._closed.wait(fault.seconds)
                sink.sendall(data)
        except OSError:
            pass  # the other direction has ended it
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
            with self._lock:
                self._open -= {source, sink}
