"""The worker's sockets: who asks, who waits for a reply, and when it is time to end.

All of it is in one thread, which never computes. While the main thread does, the caller is told that it
goes on; there is no way to stop a computation but to end the process, and what it holds can be loaded
again.
"""

import logging
import os
import queue
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from flower_split.client.worker import frames
from flower_split.client.worker.directory import check_peer
from flower_split.client.worker.frames import Frame
from flower_split.client.worker.identity import WorkerIdentity, process_mark
from flower_split.errors import WorkerError

logger = logging.getLogger(__name__)

_ASKING_SECONDS = 5.0  # for one who has connected to say what it wants
_TAKING_SECONDS = 120.0  # for a message or a reply to go over
_SIGN_SECONDS = 2.0  # between two signs that a message is computed
_ENDED = 0  # exit code: there is nothing to be done any more


class NodeProcess:
    """The process that starts the node's ClientApps, watched until it ends. Made by :meth:`open`.

    Attributes:
        descriptor: Readable when it has ended.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def open(cls, mark: str) -> Self:
        """Watch the process with a :func:`process_mark`.

        Raises:
            WorkerError: It has ended.
        """
        pid = int(mark.partition("@")[0])
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise WorkerError(f"its node's process {pid} has ended.") from error
        if process_mark(pid) != mark:  # looked at after it was opened: another one has its id
            os.close(descriptor)
            raise WorkerError(f"its node's process {pid} has ended.")
        return cls(descriptor)


@dataclass(frozen=True, slots=True)
class Job:
    """A message to be answered, as Flower's protobuf."""

    context: bytes
    message: bytes
    task: int  # Flower's id of it


@dataclass(slots=True)
class _Caller:
    """Whoever waits for the reply to the message that is computed."""

    connection: socket.socket
    since: float = field(default_factory=time.monotonic)


class WorkerSockets:
    """Everything of a worker but the answers.

    Args:
        listener: Where callers connect.
        node: Flower's id of the node.
        node_process: Ends the worker with itself; None: it waits for a first message, which names it.
        identity: What the worker can answer for.
        idle: Seconds without a message after which it ends.
        leave: Called before the end: nobody shall come any more.

    Attributes:
        jobs: What is to be answered, in turn; None: nothing any more.
        identity: What the worker can answer for; of one that waits, from its first job on.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        node: int,
        node_process: NodeProcess | None,
        identity: WorkerIdentity,
        idle: float,
        leave: Callable[[], None],
    ) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._listener = listener
        self._node = node
        self._node_process = node_process
        self.identity = identity
        self._idle = idle
        self._leave = leave
        self._caller: _Caller | None = None
        self._answered = 0
        self._asked = time.monotonic()  # when it was last of use
        self._told_to_end = False
        self._done = False
        self._selector = selectors.DefaultSelector()
        self._replies: deque[tuple[bytes, bytes]] = deque()
        self._woken, self._wake = os.pipe()

    def reply(self, context: bytes, message: bytes) -> None:
        """Give the answer to the job that was taken last. Called by the computing thread."""
        self._replies.append((context, message))
        os.write(self._wake, b"!")

    def run(self) -> None:
        """Serve until the end, which also ends the computing thread's loop."""
        try:
            with self._selector as selector:
                selector.register(self._listener, selectors.EVENT_READ, self._accept)
                selector.register(self._woken, selectors.EVENT_READ, self._send_reply)
                if self._node_process is not None:
                    self._end_with(self._node_process)
                while not self._done:
                    self._once(selector)
        except Exception:
            # The edge of a thread: without it nobody could end this process.
            logger.exception("node=%d the worker's sockets failed", self._node)
            os._exit(1)

    def _once(self, selector: selectors.BaseSelector) -> None:
        caller = self._caller
        if caller is not None:
            selector.register(caller.connection, selectors.EVENT_READ, self._caller_left)
        idle = max(0.0, self._asked + self._idle - time.monotonic())
        found = selector.select(_SIGN_SECONDS if caller is not None else idle)
        if caller is not None:
            selector.unregister(caller.connection)
        for key, _ in found:
            if not self._done:
                key.data()
        if self._caller is not None:
            self._give_a_sign(self._caller)
        elif time.monotonic() >= self._asked + self._idle:
            self._end(f"no message came for {self._idle:g} s")

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        try:
            check_peer(connection, os.geteuid())
            said = frames.receive(connection, _ASKING_SECONDS, "what the caller wants")
            keep = self._serve(connection, said)
        except WorkerError as error:
            logger.warning("node=%d a caller was turned away: %s", self._node, error)
            keep = False
        if not keep:
            connection.close()

    def _serve(self, connection: socket.socket, said: Frame) -> bool:
        """Do what is asked; return whether the connection is kept for a reply."""
        if said.kind == "answer":
            return self._take(connection, said)
        if said.kind == "state":
            _say(connection, self._state())
        elif said.kind == "end":
            self._told_to_end = True
            _say(connection, self._state())
            if self._caller is None:
                self._end("it was told to")
        return False

    def _take(self, connection: socket.socket, said: Frame) -> bool:
        if self._caller is not None or self._told_to_end:
            _say(connection, Frame("busy", {"on": f"of run {self.identity.run}"}))
            return False
        try:
            differs = self._differs(WorkerIdentity.read(said.text("identity")))
        except ValueError:  # another version's
            differs = ("code",)
        if differs:
            why = f"it was started for another {', '.join(differs)}"
            _say(connection, Frame("stale", {"why": why}))
            self._end(why)
            return False
        _say(connection, Frame("ready", {"pid": os.getpid()}))
        got = frames.receive(connection, _TAKING_SECONDS, "the message")
        self._caller = _Caller(connection)
        self.jobs.put(Job(got.blobs[0], got.blobs[1], int(got.text("task"))))
        return True

    def _differs(self, wanted: WorkerIdentity) -> tuple[str, ...]:
        """Return in what this worker is not the one that is wanted; one that waits becomes it."""
        if self.identity.may_become(wanted):
            try:
                self._end_with(NodeProcess.open(wanted.node_process))
            except WorkerError:
                return ("node_process",)
            self.identity = wanted
        return self.identity.differs(wanted)

    def _end_with(self, node_process: NodeProcess) -> None:
        self._selector.register(node_process.descriptor, selectors.EVENT_READ, self._node_ended)

    def _state(self) -> Frame:
        now = time.monotonic()
        caller = self._caller
        return Frame(
            "state",
            {
                "pid": os.getpid(),
                "node": str(self._node),
                "run": str(self.identity.run),
                "answered": self._answered,
                "seconds": now - (caller.since if caller is not None else self._asked),
                "busy": caller is not None,
            },
        )

    def _give_a_sign(self, caller: _Caller) -> None:
        try:
            frames.send(caller.connection, Frame("working"), _ASKING_SECONDS, "a sign of work")
        except WorkerError:
            self._caller_left()

    def _send_reply(self) -> None:
        os.read(self._woken, 1)
        caller, self._caller = self._caller, None
        blobs = self._replies.popleft()
        self._asked = time.monotonic()
        self._answered += 1
        if caller is None:
            return
        try:
            frames.send(caller.connection, Frame("reply", {}, blobs), _TAKING_SECONDS, "the reply")
        except WorkerError as error:
            logger.warning("node=%d %s", self._node, error)
        caller.connection.close()
        if self._told_to_end:
            self._end("it was told to")

    def _caller_left(self) -> None:
        self._end("its ClientApp has ended, and nobody waits for the reply")

    def _node_ended(self) -> None:
        self._end("its node has ended")

    def _end(self, why: str) -> None:
        """End the process: at once where it computes or loads, since nothing else stops that."""
        logger.info("node=%d the worker ends: %s", self._node, why)
        self._leave()
        self._listener.close()
        if self._caller is not None or not self.identity.run:
            logging.shutdown()
            os._exit(_ENDED)
        self._done = True
        self.jobs.put(None)


def _say(connection: socket.socket, frame: Frame) -> None:
    frames.send(connection, frame, _ASKING_SECONDS, "an answer to the caller")
