"""Frames between a ClientApp and its node's worker: a small JSON header, then blobs.

A frame is the header's length (4 bytes, big-endian), the header, and the blobs one after the other;
the header has the blobs' lengths. Nothing is pickled, and every wait has a deadline.
"""

import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from flower_split.errors import WorkerError

Field = str | int | float | bool | tuple[str, ...]

_LENGTH = struct.Struct("!I")
_MAX_HEADER = 1 << 20  # bytes
_MAX_BLOB = 1 << 31  # bytes; protobuf's own limit
_NO_FIELDS: Mapping[str, Field] = MappingProxyType({})


class Closed(WorkerError):
    """The other side has closed the connection, or ended."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One thing that is said."""

    kind: str
    fields: Mapping[str, Field] = field(default_factory=lambda: _NO_FIELDS)
    blobs: tuple[bytes, ...] = ()

    def text(self, name: str) -> str:
        """Return a field as text; empty where it is not there."""
        return str(self.fields.get(name, ""))


def send(connection: socket.socket, frame: Frame, seconds: float, what: str) -> None:
    """Send a frame.

    Args:
        connection: To the other side.
        frame: What is said.
        seconds: Until all of it is taken.
        what: Is waited for, for the message.

    Raises:
        Closed: The other side is gone.
        WorkerError: It does not take it in time.
    """
    header = json.dumps(
        {"kind": frame.kind, "fields": dict(frame.fields), "blobs": [len(b) for b in frame.blobs]}
    ).encode()
    deadline = time.monotonic() + seconds
    try:
        for part in (_LENGTH.pack(len(header)) + header, *frame.blobs):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.sendall(part)
    except TimeoutError as error:
        raise WorkerError(f"{what} was not taken within {seconds:g} s.") from error
    except OSError as error:
        raise Closed(f"{what}: the connection was closed ({error.strerror or error}).") from error


def receive(connection: socket.socket, seconds: float, what: str) -> Frame:
    """Return the next frame.

    Args:
        connection: To the other side.
        seconds: Until all of it is there.
        what: Is waited for, for the message.

    Raises:
        Closed: The other side is gone.
        WorkerError: It does not come in time, or is no frame.
    """
    reader = _Reader(connection, time.monotonic() + seconds)
    try:
        header = json.loads(reader.read(_LENGTH.unpack(reader.read(_LENGTH.size))[0], _MAX_HEADER))
        blobs = tuple(reader.read(size, _MAX_BLOB) for size in header["blobs"])
        values = {
            str(name): tuple(map(str, value)) if isinstance(value, list) else value
            for name, value in header["fields"].items()
        }
        return Frame(str(header["kind"]), values, blobs)
    except TimeoutError as error:
        raise WorkerError(f"{what} did not come within {seconds:g} s.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkerError(f"{what}: what came is no frame of this protocol ({error}).") from error
    except EOFError as error:
        raise Closed(f"{what}: the connection was closed.") from error
    except OSError as error:
        raise Closed(f"{what}: the connection was closed ({error.strerror or error}).") from error


class _Reader:
    """Reads whole pieces until a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def read(self, size: int, limit: int = _MAX_HEADER) -> bytes:
        """Return the next ``size`` bytes.

        Raises:
            ValueError: They would be more than ``limit``.
            TimeoutError: The deadline has passed.
            EOFError: The other side has closed.
        """
        if not 0 <= size <= limit:
            raise ValueError(f"{size} bytes, and {limit} at most are taken")
        found = bytearray(size)
        view = memoryview(found)
        while view:
            self._connection.settimeout(max(0.001, self._deadline - time.monotonic()))
            count = self._connection.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(found)
