"""Processes that stand for SuperNodes: each answers one message after the other with the ClientApp.

They are forked before this process has a second thread, and with every module loaded, so that one
starts in milliseconds. What travels is Flower's own protobuf, message and node context, as it would
to a SuperNode.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.object_ref import load_app
from flwr.supercore.task_identity import TaskIdentity

from flower_split.errors import ConfigError
from flower_split.runtime.closing import Closing

logger = logging.getLogger(__name__)

RUN_ID = 1
_END_SECONDS = 5.0  # for a process that was told to end


class NodeLost(Exception):
    """The process that was asked has ended."""


@dataclass(frozen=True, slots=True)
class ClientAppRef:
    """Where the processes find their ClientApp."""

    name: str  # module:attribute
    folder: Path  # the app's directory, for modules of its own


class NodeProcess:
    """One process, as its parent sees it. Not for two threads at a time."""

    def __init__(self, process: ForkProcess, connection: Connection) -> None:
        self._process = process
        self._connection = connection

    def ask(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Return the reply to a message, and the node's context after it.

        Raises:
            NodeLost: The process ended meanwhile.
        """
        try:
            self._connection.send_bytes(message_to_proto(message).SerializeToString())
            self._connection.send_bytes(context_to_proto(context).SerializeToString())
            reply = message_from_proto(ProtoMessage.FromString(self._connection.recv_bytes()))
            after = context_from_proto(ProtoContext.FromString(self._connection.recv_bytes()))
        except (OSError, EOFError) as error:
            self._process.join(_END_SECONDS)
            raise NodeLost(f"exit code {self.exit_code}") from error
        return reply, after

    @property
    def exit_code(self) -> int | None:
        """Return how it ended; None: it runs."""
        return self._process.exitcode

    def tell_to_end(self) -> None:
        """Close the connection, which ends a process that waits for a message."""
        self._connection.close()

    def end(self) -> None:
        """Wait for its end, and end it by force where it does not."""
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class NodeProcesses(Closing):
    """The processes of one run. Made by :meth:`fork`."""

    def __init__(self, processes: Sequence[NodeProcess]) -> None:
        self.processes = tuple(processes)

    @classmethod
    def fork(cls, count: int, client_app: ClientAppRef) -> "NodeProcesses":
        """Fork ``count`` processes. Call it before this process starts a thread or uses torch.

        Args:
            count: As many clients can work at a time.
            client_app: What answers; loaded with the first message.
        """
        context = multiprocessing.get_context("fork")
        pairs = [context.Pipe() for _ in range(count)]
        made = []
        for index, (mine, theirs) in enumerate(pairs):
            # A process that held an end of another one's pipe would keep it from ending.
            others = [end for number, pair in enumerate(pairs) for end in pair if number != index]
            process = context.Process(
                target=_serve,
                args=(theirs, [*others, mine], client_app),
                name=f"node-{index}",
                daemon=True,
            )
            process.start()
            made.append(NodeProcess(process, mine))
        for _, theirs in pairs:
            theirs.close()
        return cls(made)

    def close(self) -> None:
        """End all processes; those at work get a short grace."""
        for process in self.processes:
            process.tell_to_end()
        for process in self.processes:
            process.end()


def identify(node_id: int) -> None:
    """Tell Flower whose messages this process makes, as its own processes do at their start."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = RUN_ID, RUN_ID, node_id


def _serve(
    connection: Connection, not_mine: Sequence[Connection], client_app: ClientAppRef
) -> None:
    """Answer messages until the parent closes the connection, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in not_mine:
        end.close()
    # As in a process of Flower's, the ClientApp says what it logs: warnings, to standard error.
    logging.getLogger("flower_split").handlers.clear()
    app: ClientApp | None = None
    with contextlib.suppress(OSError, EOFError):  # the parent is gone
        while True:
            message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
            context = context_from_proto(ProtoContext.FromString(connection.recv_bytes()))
            identify(context.node_id)
            try:
                app = app or load_app(client_app.name, ConfigError, client_app.folder)
                reply = app(message, context)
            except Exception as error:
                # The edge: as a SuperNode, it tells its ServerApp what the ClientApp raised.
                logger.exception("node=%d the ClientApp raised", context.node_id)
                code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                if app is None:
                    code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
                reply = Message(Error(code, f"{type(error).__name__}: {error}"), reply_to=message)
            connection.send_bytes(message_to_proto(reply).SerializeToString())
            connection.send_bytes(context_to_proto(context).SerializeToString())
    logging.shutdown()
    os._exit(0)
