"""A Flower grid over the node processes of this machine."""

import threading
import time
from collections.abc import Iterable, Mapping

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from flower_split.config import Scalar
from flower_split.errors import FederationError
from flower_split.local.nodes import RUN_ID, NodeLost, NodeProcess, NodeProcesses
from flower_split.messages.orders import HandshakeOrder
from flower_split.runtime.simulation import SIMULATED
from flower_split.server.federation.handshake import SimulatedGrid

_FIRST_NODE = 1
_POLL_SECONDS = 0.05


class LocalGrid(SimulatedGrid):
    """Nodes 1, 2, ... with partitions 0, 1, ...; whichever process is free answers for one.

    Args:
        nodes: The processes, forked.
        num_nodes: How many nodes there are; more than processes is allowed.
        run_config: Of every node's context.
    """

    def __init__(
        self, nodes: NodeProcesses, num_nodes: int, run_config: Mapping[str, Scalar]
    ) -> None:
        self._contexts = {
            _FIRST_NODE + index: Context(
                run_id=RUN_ID,
                node_id=_FIRST_NODE + index,
                node_config={
                    "partition-id": index,
                    "num-partitions": num_nodes,
                    SIMULATED: True,
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(num_nodes)
        }
        self._changed = threading.Condition()  # its lock guards what follows
        self._waiting: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._count = 0
        self._alive = len(nodes.processes)
        self._idle: list[NodeProcess] = []
        self._given: dict[NodeProcess, Message] = {}
        self._last: dict[int, NodeProcess] = {}  # node -> who answered for it, and has its data
        for process in nodes.processes:
            threading.Thread(target=self._work, args=(process,), daemon=True).start()

    def prepare(self) -> None:
        """Have every node load its data now, while something else is waited for.

        They are asked what the handshake asks, which loads it; nobody looks at the replies. With fewer
        processes than nodes nothing is asked: another process might answer for the node next.
        """
        if self._alive < len(self._contexts):
            return
        orders = [
            Message(HandshakeOrder().write(), node, MessageType.QUERY) for node in self._contexts
        ]
        self.push_messages(orders)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes: they are there from the beginning."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for the processes; return their ids."""
        names = []
        with self._changed:
            for message in messages:
                self._count += 1
                names.append(f"message-{self._count}")
                message.metadata.__dict__["_message_id"] = names[-1]
                self._waiting.append(message)
            self._hand_out()
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to these messages."""
        with self._changed:
            return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies that came in time."""
        left = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while left and (deadline is None or time.monotonic() < deadline):
            new = list(self.pull_messages(left))
            left -= {reply.metadata.reply_to_message_id for reply in new}
            replies += new
            if left and not new:
                time.sleep(_POLL_SECONDS)
        return replies

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Refuse: a local run is none of a SuperLink's.

        Raises:
            FederationError: Always.
        """
        raise _no_run("set_run")

    @property
    def run(self) -> Run:
        """Refuse: a local run is none of a SuperLink's.

        Raises:
            FederationError: Always.
        """
        raise _no_run("run")

    def _work(self, process: NodeProcess) -> None:
        """Give one process message after message, until it is lost."""
        while True:
            message = self._next(process)
            node = message.metadata.dst_node_id
            try:
                reply, context = process.ask(message, self._contexts[node])
            except NodeLost as error:
                with self._changed:
                    self._replies[message.metadata.message_id] = _unavailable(message, str(error))
                    self._alive -= 1
                    self._last = {n: p for n, p in self._last.items() if p is not process}
                    self._hand_out()
                return
            with self._changed:
                self._contexts[node] = context
                self._replies[message.metadata.message_id] = reply

    def _next(self, process: NodeProcess) -> Message:
        """Wait for the message that ``process`` is to answer next."""
        with self._changed:
            self._idle.append(process)
            self._hand_out()
            while process not in self._given:
                self._changed.wait()
            return self._given.pop(process)

    def _hand_out(self) -> None:
        """Give waiting messages to idle processes; the caller holds the lock.

        A node stays with the process that answered for it before, which has its data in memory, where
        that one is idle; with as many processes as nodes its messages wait for it.
        """
        own = self._alive >= len(self._contexts)
        for message in list(self._waiting):
            if not self._idle:
                break
            node = message.metadata.dst_node_id
            process = self._last.get(node)
            if process is not None and process not in self._idle and own:
                continue
            self._waiting.remove(message)
            if process not in self._idle:
                wanted = [self._last.get(other.metadata.dst_node_id) for other in self._waiting]
                process = next((p for p in self._idle if p not in wanted), self._idle[0])
            self._idle.remove(process)
            self._last[node] = process
            self._given[process] = message
        if not self._alive:
            for message in self._waiting:
                reply = _unavailable(message, "no process is left")
                self._replies[message.metadata.message_id] = reply
            self._waiting.clear()
        self._changed.notify_all()


def _no_run(name: str) -> FederationError:
    return FederationError(
        f"Grid.{name} is about a SuperLink's run, and a run with --local has no SuperLink. Leave the "
        "call out of the ServerApp, or run the app without --local."
    )


def _unavailable(message: Message, why: str) -> Message:
    reason = (
        f"its process died ({why}): killed, crashed, or out of memory (a local run does not replace "
        "it; a new run can resume this one)"
    )
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
