"""A link of a known rate and distance on loopback: what a network takes, without one.

A proxy in a process of its own carries bytes between a client and a server. Each way is a token bucket
with a delay behind it: a piece leaves when the pieces before it have left and its own bytes are
through, and arrives half a round trip later. All connections through one link share its two ways, and
a sender that is too fast is stopped by TCP after 2 ms of the rate; what the receiver does not take waits
in the proxy. Nothing is lost or reordered, and
no congestion control runs beyond loopback's: raw TCP uses such a link fully, so it is the strictest
reference.
"""

import math
import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from flower_split.errors import ConfigError

_AHEAD = 0.002  # seconds of the rate that a sender may be ahead
_SMALLEST, _LARGEST = 16 << 10, 1 << 20  # bytes of a piece


@dataclass(frozen=True, slots=True)
class Link:
    """A link.

    Args:
        megabits: A second, each way.
        round_trip: Seconds there and back of a byte.

    Raises:
        ConfigError: No bytes pass, or they arrive before they are sent.
    """

    megabits: float
    round_trip: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.megabits < math.inf and 0 <= self.round_trip < math.inf):
            raise ConfigError(
                "--link must be above 0 Mbit/s and --round-trip 0 ms or more; they are "
                f"{self.megabits:g} Mbit/s and {1e3 * self.round_trip:g} ms. Leave both out for loopback "
                "as it is."
            )

    @property
    def bytes_per_second(self) -> float:
        """The rate each way."""
        return self.megabits * 1e6 / 8

    def __str__(self) -> str:
        return f"{self.megabits:g} Mbit/s, {1e3 * self.round_trip:g} ms there and back"


class _Way:
    """One direction of a link; thread-safe."""

    def __init__(self, link: Link) -> None:
        self.delay, self._rate = link.round_trip / 2, link.bytes_per_second
        self.piece = round(min(max(self._rate * _AHEAD / 2, _SMALLEST), _LARGEST))
        self._free, self._lock = 0.0, threading.Lock()

    def leave(self, num_bytes: int) -> float:
        """Send so many bytes; return when the last of them has left, by the monotonic clock."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + num_bytes / self._rate
            return self._free

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        """Start to carry what ``source`` sends to ``target``, until it ends."""
        there: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        for work in (lambda: self._take(source, there), lambda: _hand_over(there, target)):
            threading.Thread(target=work, daemon=True).start()

    def _take(self, source: socket.socket, there: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(self.piece)
            except OSError:  # closed under it
                data = b""
            left = self.leave(len(data))
            there.put((left + self.delay, data))
            _sleep_until(left - _AHEAD)


def _hand_over(there: "queue.SimpleQueue[tuple[float, bytes]]", target: socket.socket) -> None:
    while True:
        due, data = there.get()
        _sleep_until(due)
        with suppress(OSError):  # the other side has gone; its sender learns that by itself
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)


def _sleep_until(when: float) -> None:
    left = when - time.monotonic()
    if left > 0:
        time.sleep(left)


def serve_link(ready: Connection, link: Link, target: int) -> None:
    """Carry every connection to a port of this machine over one link, until the pipe closes.

    Args:
        ready: Is sent the port to connect to.
        link: What is between.
        target: The port that is behind it.
    """
    there, back = _Way(link), _Way(link)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        threading.Thread(target=_accept, args=(listener, target, there, back), daemon=True).start()
        with suppress(EOFError):
            ready.recv()


def _accept(listener: socket.socket, target: int, there: _Way, back: _Way) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(("127.0.0.1", target))
        except OSError:  # nobody is behind the link: its client learns that, and waits for nothing
            near.close()
            continue
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there.carry(near, far)
        back.carry(far, near)
