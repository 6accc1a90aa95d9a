"""The ClientApp's side: have the node's worker answer a message, and start one where there is none.

Whatever goes wrong with the worker is a :class:`WorkerError`, and the caller then answers by itself. A
worker that was given the message and was lost is gone for certain before that error is raised, so that
no message is ever computed twice at a time. That it was computed in part does no harm: the trunk gives
a repeated call the reply that it gave first, or, if it has stepped since, has the round begin again.
"""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from flwr.app import Context, Message
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import EncodeError

from flower_split.client.worker import frames
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.frames import Closed, Frame
from flower_split.client.worker.identity import WorkerIdentity
from flower_split.errors import WorkerError, WorkerStuck
from flower_split.runtime.closing import Closing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds that this side waits."""

    start: float = 60.0  # until a worker is there: a former one has ended, a new one listens
    taking: float = 120.0  # until it has taken the message
    silence: float = 120.0  # without a sign from a worker that computes
    end: float = 10.0  # until a worker that was killed is gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a new worker is given."""

    directory: WorkerDirectory
    node: int
    identity: WorkerIdentity
    listener: socket.socket
    lock: int  # an open file


Starter = Callable[[Start], object]


def start_worker(start: Start, idle: float = 600.0) -> int:
    """Start a worker as a process of its own, which outlives this one; return its id.

    It has this process's environment, directory, import path and standard error.

    Args:
        start: What it is given.
        idle: Seconds without a message after which it ends.

    Raises:
        OSError: It cannot be started.
    """
    given = (start.listener.fileno(), start.lock, start.directory.descriptor)
    arguments = (str(start.node), str(idle), *map(str, given), start.identity.write())
    for descriptor in given:
        os.set_inheritable(descriptor, True)
    try:
        return os.posix_spawn(
            start.identity.interpreter,
            [
                start.identity.interpreter,
                "-P",
                "-m",
                "flower_split.client.worker.serve",
                *arguments,
            ],
            {**os.environ, "PYTHONPATH": os.pathsep.join(start.identity.import_path)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, 2, 1),
            ],
            setsid=True,  # a signal to this process's group is not the worker's
        )
    finally:
        for descriptor in given:
            os.set_inheritable(descriptor, False)


class ReadyWorker(Closing):
    """A worker that is ready for this process's message. Made by :meth:`get`."""

    def __init__(self, connection: socket.socket, pid: int, patience: Patience) -> None:
        self._connection = connection
        self._patience = patience
        self._pid = pid
        try:  # while it is there, so that what is killed later is this process and no other
            self._process = os.pidfd_open(pid)
        except OSError as error:
            connection.close()
            raise WorkerError(f"the worker, process {pid}, has ended: {error.strerror}.") from error

    @classmethod
    def get(
        cls,
        directory: WorkerDirectory,
        node: int,
        identity: WorkerIdentity,
        *,
        start: Starter = start_worker,
        patience: Patience | None = None,
    ) -> Self:
        """Return the node's worker, ready; start one where there is none for this.

        Args:
            directory: Where workers are met.
            node: Flower's id of the node.
            identity: What it must be good for.
            start: Starts one.
            patience: None: the usual.

        Raises:
            WorkerError: It is at work for another ClientApp, does not start, or does not answer.
        """
        patience = patience or Patience()
        deadline = time.monotonic() + patience.start
        started = False
        while time.monotonic() < deadline:
            lock = directory.lock(node)
            if lock is not None:
                if started:
                    os.close(lock)
                    raise WorkerError("the worker ended as it started; its log says why.")
                launch(directory, node, identity, lock, start)
                started = True
            connection = directory.connect(node, patience.start)
            if connection is not None:
                left = max(0.1, deadline - time.monotonic())
                pid = _greet(connection, identity, left)
                if pid:
                    return cls(connection, pid, patience)
                connection.close()
            time.sleep(0.02)  # one is starting, or ending
        raise WorkerError(f"no worker was there for this node within {patience.start:g} s.")

    def answer(self, message: Message, context: Context) -> Message:
        """Return the worker's reply; the context has the state that it left.

        Raises:
            WorkerError: It was lost, or has said nothing for too long. It is gone then.
            WorkerStuck: The same, and it does not end.
        """
        try:
            blobs = (
                context_to_proto(context).SerializeToString(),
                message_to_proto(message).SerializeToString(),
            )
        except (ValueError, EncodeError) as error:  # more than 2 GiB
            raise WorkerError(f"the message cannot be handed over: {error}.") from error
        try:
            self._send(Frame("message", {"task": TaskIdentity.task_id}, blobs))
            found = self._wait()
            after = context_from_proto(ProtoContext.FromString(found.blobs[0]))
            reply = message_from_proto(ProtoMessage.FromString(found.blobs[1]))
        except BaseException:
            self._make_sure_it_is_gone()
            raise
        context.state = after.state
        return reply

    def close(self) -> None:
        """Close the connection: a worker that still computes ends. Idempotent."""
        self._connection.close()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _send(self, frame: Frame) -> None:
        frames.send(self._connection, frame, self._patience.taking, "the message to the worker")

    def _wait(self) -> Frame:
        while True:
            said = frames.receive(
                self._connection, self._patience.silence, "a sign of the worker, which computes,"
            )
            if said.kind == "reply":
                return said
            if said.kind != "working":
                raise WorkerError(f"the worker sent {said.kind!r} where its reply is due.")

    def _make_sure_it_is_gone(self) -> None:
        """End the worker, and wait until it has.

        Raises:
            WorkerStuck: It cannot be ended; then nobody may compute the message again here.
        """
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        gone, _, _ = select.select([self._process], [], [], self._patience.end)
        if not gone:
            raise WorkerStuck(
                f"the worker, process {self._pid}, was lost and does not end within "
                f"{self._patience.end:g} s of SIGKILL. End it before this node trains again."
            )


def launch(
    directory: WorkerDirectory, node: int, identity: WorkerIdentity, lock: int, start: Starter
) -> None:
    """Start a worker, and leave socket and lock to it.

    Args:
        directory: The directory in which workers are met.
        node: Flower's id of the node.
        identity: The identity that it is to have.
        lock: The node's lock, of :meth:`WorkerDirectory.lock`; it is closed here.
        start: Starts one.

    Raises:
        WorkerError: It cannot be started.
    """
    try:
        with directory.listen(node) as listener:
            start(
                Start(
                    directory=directory, node=node, identity=identity, listener=listener, lock=lock
                )
            )
    except OSError as error:
        raise WorkerError(f"no worker can be started: {error}.") from error
    finally:
        os.close(lock)
    logger.info("node=%d a worker was started for this node's messages", node)


def _greet(connection: socket.socket, identity: WorkerIdentity, seconds: float) -> int:
    """Return the worker's process id if it is ready; 0 if it ends.

    Raises:
        WorkerError: It is at work, or does not answer in time.
    """
    what = "the worker's answer to whether it is ready"
    try:
        frames.send(connection, Frame("answer", {"identity": identity.write()}), seconds, what)
        said = frames.receive(connection, seconds, what)
    except Closed:
        return 0
    except WorkerError:
        connection.close()
        raise
    if said.kind == "ready":
        return int(said.text("pid"))
    if said.kind == "busy":
        connection.close()
        raise WorkerError(f"the worker is at work on another message ({said.text('on')}).")
    logger.info("the worker ends, and a new one is started: %s", said.text("why"))
    return 0
