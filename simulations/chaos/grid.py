"""A Flower grid whose nodes are processes of this machine, reached by Unix sockets.

It stands for SuperLink and SuperNodes where hundreds of kills must not take hours: a message goes to
the node's process as Flower's own protobuf, and a node that dies with a message answers, as
Flower's SuperLink does, with the error NODE_UNAVAILABLE.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Client, Listener

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_CONNECT_SECONDS = 30.0  # a node that was killed is started again meanwhile


class ProcessGrid(Grid):
    """The coordinator's side.

    Args:
        nodes: Node id to the address of its socket.
    """

    def __init__(self, nodes: Mapping[int, str]) -> None:
        _identify(0)
        self._nodes = dict(nodes)
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._count = 0

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, running or not."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand every message to its node, on a thread of its own."""
        names = []
        for message in messages:
            self._count += 1
            name = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = name
            threading.Thread(target=self._ask, args=(message, name), daemon=True).start()
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        with self._lock:
            return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def _ask(self, message: Message, name: str) -> None:
        try:
            address = self._nodes[message.metadata.dst_node_id]
            with _connect(address) as connection:
                connection.send_bytes(message_to_proto(message).SerializeToString())
                reply = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
        except (OSError, EOFError):
            error = Error(ErrorCode.NODE_UNAVAILABLE, "the node's process ended")
            reply = Message(error, reply_to=message)
        with self._lock:
            self._replies[name] = reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not needed: the round loop polls."""
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Not needed: strategies make their messages themselves."""
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        """Not needed."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Not needed."""
        raise NotImplementedError


def _identify(node_id: int) -> None:
    """Tell Flower whose messages this process makes, as its own processes do at their start."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, node_id


def _connect(address: str):
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return Client(address, family="AF_UNIX")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def serve_node(address: str, node_id: int, node_config, run_config) -> None:
    """The node's side: answer messages with the package's own ClientApp, one after the other."""
    from flower_split.client.app import app

    _identify(node_id)
    state = RecordDict()  # kept in memory, as a SuperNode does: it ends with the process
    with Listener(address, family="AF_UNIX", backlog=16) as listener:
        while True:
            try:
                with listener.accept() as connection:
                    message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
                    context = Context(0, node_id, node_config, state, run_config)
                    reply = app(message, context)
                    connection.send_bytes(message_to_proto(reply).SerializeToString())
            except (OSError, EOFError):
                continue  # whoever asked is gone
