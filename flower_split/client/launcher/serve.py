"""The launcher: a process that has loaded Flower, and forks a ClientApp's process for every message.

It has one thread and no connection to anybody, so that a fork is sound. It ends with its SuperNode. Where
this package or what is installed has changed since it started, it takes no more starts, and Flower's own
command loads everything anew.
"""

import gc
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

import flower_split.client.app
import flower_split.client.worker.asking
from flower_split.client.worker.directory import check_peer
from flower_split.client.worker.identity import code_mark
from flower_split.errors import WorkerError
from flower_split.runtime.flower_pulls import pull_sooner

_LENGTH = struct.Struct("!I")
_MAX_START = 1 << 22  # bytes
_SECONDS = 5.0  # for a start to be told
_STREAMS = 3
LOADED = (flower_split.client.app, flower_split.client.worker.asking)
"""What of this package a message takes, beside the app's own modules."""


@dataclass(frozen=True, slots=True)
class Start:
    """A process that Flower wants."""

    arguments: Sequence[str]
    directory: str
    environment: Mapping[str, str]
    streams: Sequence[int]  # standard input, output and error

    @classmethod
    def receive(cls, connection: socket.socket) -> "Start":
        """Read what a caller wants.

        Raises:
            OSError: It says nothing, or leaves.
            ValueError: It is no start.
        """
        head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, _STREAMS)
        try:
            size = _LENGTH.unpack(head)[0]
            if len(streams) != _STREAMS or size > _MAX_START:
                raise ValueError(f"{len(streams)} streams and {size} bytes are no start")
            text = b""
            while len(text) < size:
                part = connection.recv(size - len(text))
                if not part:
                    raise ConnectionResetError
                text += part
            said = json.loads(text)
            return cls(
                [str(argument) for argument in said["arguments"]],
                str(said["directory"]),
                {str(name): str(value) for name, value in said["environment"].items()},
                streams,
            )
        except (struct.error, KeyError, TypeError, AttributeError) as error:
            _close(streams)
            raise ValueError(str(error)) from error
        except (OSError, ValueError):
            _close(streams)
            raise


class Launcher:
    """Forks processes for whoever asks, until its SuperNode has ended.

    Args:
        listener: The socket to which Flower's commands hand their starts over.
        node: Process id of the SuperNode.
    """

    def __init__(self, listener: socket.socket, node: int) -> None:
        self._listener = listener
        self._node = os.pidfd_open(node)
        self._code = code_mark()
        self._selector = selectors.DefaultSelector()
        self._callers: dict[
            int, tuple[int, socket.socket]
        ] = {}  # by descriptor: process, its caller

    def run(self) -> Start | None:
        """Serve until the SuperNode has ended; in a forked process, return what it is to do."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._node, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._node:
                    return None
                if key.fd in self._callers:
                    self._ended(key.fd)
                else:
                    start = self._accept()
                    if start is not None:
                        return start

    def _accept(self) -> Start | None:
        """Take a start and fork; return it in the new process."""
        connection, _ = self._listener.accept()
        try:
            check_peer(connection, os.geteuid())
            connection.settimeout(_SECONDS)
            start = Start.receive(connection)
        except (OSError, ValueError, WorkerError):
            connection.close()  # it becomes Flower's own command
            return None
        if code_mark() != self._code:
            connection.close()
            _close(start.streams)
            return None
        process = os.fork()
        if process == 0:
            connection.close()
            self._leave()
            return start
        _close(start.streams)
        descriptor = os.pidfd_open(process)
        self._callers[descriptor] = process, connection
        self._selector.register(descriptor, selectors.EVENT_READ)
        connection.setblocking(False)
        _say(connection, b"y")
        return None

    def _ended(self, descriptor: int) -> None:
        """Tell a caller how its process has ended."""
        process, connection = self._callers.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        _say(connection, bytes([code if code >= 0 else 128 - code]))
        connection.close()

    def _leave(self) -> None:
        """Close what is the launcher's, in a process that it has forked."""
        self._selector.close()
        self._listener.close()
        os.close(self._node)
        for descriptor, (_, connection) in self._callers.items():
            os.close(descriptor)
            connection.close()


def become(start: Start) -> None:
    """Make a forked process what Flower would have started."""
    for wanted, stream in enumerate(start.streams):
        os.dup2(stream, wanted)
    _close(start.streams)
    os.chdir(start.directory)
    os.environ.clear()
    os.environ.update(start.environment)
    sys.argv = ["flwr-clientapp", *start.arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_and_end() -> NoReturn:
    """Be Flower's command, and end as it ends.

    The modules of a process that ends are not taken down one by one: in a fork that would first copy
    every page of them.
    """
    code: object = 0
    try:
        flwr_clientapp()
    except SystemExit as end:  # after Flower's own exit handlers
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _say(connection: socket.socket, word: bytes) -> None:
    try:
        connection.sendall(word)
    except OSError:
        pass  # the caller has gone; its process ends by Flower's own rules


def _close(streams: Sequence[int]) -> None:
    for stream in streams:
        os.close(stream)


def main(arguments: list[str]) -> int:
    """Serve until the SuperNode has ended; in a forked process, be Flower's ``flwr-clientapp``.

    Args:
        arguments: The listening socket's descriptor, the SuperNode's process id, the folder to remove.
    """
    listener, node, folder = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its SuperNode decides what Ctrl-C means
    os.set_inheritable(listener, False)
    pull_sooner()
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page of what is loaded
    try:
        start = Launcher(socket.socket(fileno=listener), node).run()
    except OSError:
        traceback.print_exc()
        start = None
    if start is None:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    become(start)
    _run_and_end()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
