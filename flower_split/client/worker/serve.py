"""The worker's process: ``python -m flower_split.client.worker.serve``, started by a ClientApp.

The main thread loads the app with the first message and computes, as a ClientApp's process does; a second
one (:mod:`flower_split.client.worker.doorman`) has all sockets, and sees to it that the process ends:
with its node, with the caller of the message that it computes, or after a time without messages.
"""

import gc
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
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

from flower_split.client.worker.doorman import Doorman, Job, NodeProcess
from flower_split.client.worker.meeting import MeetingPlace
from flower_split.client.worker.serves import Serves
from flower_split.errors import ConfigError, WorkerError
from flower_split.runtime import failpoints
from flower_split.runtime.logs import log_to_stderr

logger = logging.getLogger(__name__)


class Desk:
    """Where messages are answered, one after the other, by the app of one run.

    Args:
        serves: Which app.
    """

    def __init__(self, serves: Serves) -> None:
        self._serves = serves
        self._app: ClientApp | None = None

    def answer(self, job: Job) -> tuple[bytes, bytes]:
        """Return the node context after a message, and the reply to it.

        What the app raises is in the reply, in the words that Flower's own process has for it.
        """
        context = context_from_proto(ProtoContext.FromString(job.context))
        message = message_from_proto(ProtoMessage.FromString(job.message))
        TaskIdentity.task_id, TaskIdentity.run_id = job.task, context.run_id
        TaskIdentity.node_id = context.node_id
        reply = self._reply(message, context)
        after = context_to_proto(context).SerializeToString()
        return after, message_to_proto(reply).SerializeToString()

    def _reply(self, message: Message, context: Context) -> Message:
        code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        try:
            app = self._loaded()
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return app(message, context)
        except Exception as error:
            # The edge: as Flower's process, it tells the ServerApp what the ClientApp raised.
            logger.exception("node=%d the ClientApp raised", context.node_id)
            return Message(Error(code, f"{type(error)}:<'{error}'>"), reply_to=message)

    def _loaded(self) -> ClientApp:
        if self._app is None:
            found = load_app(self._serves.app, ConfigError, Path(self._serves.folder))
            if not isinstance(found, ClientApp):
                raise ConfigError(f"{self._serves.app} must be a ClientApp; it is {type(found)}.")
            self._app = found
        return self._app


def release_unused() -> None:
    """Give back what a message needed and the next one need not find: garbage, cached device memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    """Serve until there is a reason to end; the exit code is 0 then.

    Args:
        arguments: Node, seconds without messages, open files (socket, lock, directory), what is served.
    """
    node, idle, listener, lock, directory = arguments[:5]
    log_to_stderr(logging.WARNING)  # as a ClientApp
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its node decides what Ctrl-C means
    failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
    for descriptor in (int(listener), int(lock), int(directory)):
        os.set_inheritable(descriptor, False)  # the lock is this process's, not its children's
    place = MeetingPlace(int(directory), Path(os.readlink(f"/proc/self/fd/{directory}")))
    serves = Serves.read(arguments[5])
    try:
        node_process = NodeProcess.open(serves.node_process)
    except WorkerError as error:
        logger.info("node=%s the worker ends as it starts: %s", node, error)
        place.remove(int(node))
        return 0
    doorman = Doorman(
        listener=socket.socket(fileno=int(listener)),
        node=int(node),
        node_process=node_process,
        serves=serves,
        idle=float(idle),
        leave=lambda: place.remove(int(node)),
    )
    thread = threading.Thread(target=doorman.run, name="doorman", daemon=True)
    thread.start()
    desk = Desk(serves)
    while (job := doorman.jobs.get()) is not None:
        doorman.reply(*desk.answer(job))
        del job
        release_unused()
    thread.join()
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the node's log is gone
        raise SystemExit(main(sys.argv[1:]))
