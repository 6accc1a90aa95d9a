"""A TCP proxy in this process that a test lets fail: cut, delay, refuse or duplicate."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

_CHUNK = 65536
_MIRROR_SECONDS = 2.0  # a duplicate that its receiver does not take is given up


@dataclass(slots=True)
class Fault:
    """What happens to connections until it has happened ``times`` times.

    Args:
        kind: ``cut`` ends a connection after ``after_bytes`` in either direction; ``delay`` holds
            its bytes back once for ``seconds``; ``refuse`` ends a new connection at once;
            ``duplicate`` delivers all that a new connection sends twice, the second time over a
            connection of its own whose answers nobody reads, so that every call on it arrives twice.
        after_bytes: From the fault's beginning, over one direction of one connection.
        seconds: Of a delay.
        times: How often it happens.
    """

    kind: str
    after_bytes: int = 0
    seconds: float = 0.0
    times: int = 1


class Proxy:
    """Forwards ``127.0.0.1:port`` to ``target``; serves from its construction until :meth:`close`.

    Args:
        target: Host and port.
        duplicates: Asked of every new connection whether to duplicate it, beside the faults that
            are injected one by one; None: never.
    """

    def __init__(
        self, target: tuple[str, int], duplicates: Callable[[], bool] | None = None
    ) -> None:
        self.target = target
        self._duplicates = duplicates
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
            twice = self._take("duplicate") is not None
            if not twice and self._duplicates is not None and self._duplicates():
                twice = True
                self.fired["duplicate"] = self.fired.get("duplicate", 0) + 1
            mirror = self._mirror() if twice else None
            for source, sink, copy in ((client, server, mirror), (server, client, None)):
                threading.Thread(
                    target=self._forward, args=(source, sink, copy), daemon=True
                ).start()

    def _mirror(self) -> socket.socket:
        """A second connection to the target; what it answers is thrown away."""
        mirror = socket.create_connection(self.target, timeout=_MIRROR_SECONDS)
        with self._lock:
            self._open.add(mirror)

        def drain() -> None:
            while not self._closed.is_set():
                try:
                    if not mirror.recv(_CHUNK):
                        return
                except TimeoutError:
                    continue
                except OSError:
                    return

        threading.Thread(target=drain, daemon=True).start()
        return mirror

    def _forward(
        self, source: socket.socket, sink: socket.socket, copy: socket.socket | None
    ) -> None:
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
                copy = _deliver(copy, data)
        except OSError:
            pass  # the other direction has ended it
        finally:
            for end in (source, sink) if copy is None else (source, sink, copy):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
            with self._lock:
                self._open -= {source, sink, copy}


def _deliver(copy: socket.socket | None, data: bytes) -> socket.socket | None:
    """Send a duplicate; ``None`` once it cannot be delivered any more."""
    if copy is not None:
        try:
            copy.sendall(data)
        except OSError:
            copy.close()
            return None
    return copy
