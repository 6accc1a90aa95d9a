"""The worker's process: ``python -m flower_split.client.worker.serve``, started by a ClientApp.

Started by ``flower-split worker``, it has no run yet: it loads torch and transformers, and waits for one.
The main thread loads the app with the first message and computes, as a ClientApp's process does; a second
one (:mod:`flower_split.client.worker.sockets`) has all sockets, and sees to it that the process ends:
with its node, with the caller of the message that it computes, or after a time without messages.
"""

import gc
import importlib
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

from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.identity import WorkerIdentity
from flower_split.client.worker.sockets import Job, NodeProcess, WorkerSockets
from flower_split.errors import ConfigError, WorkerError
from flower_split.runtime import failpoints
from flower_split.runtime.logs import log_to_stderr

logger = logging.getLogger(__name__)


class LoadedApp:
    """The ClientApp of one run, loaded with the first message; answers one after the other.

    Args:
        identity: Names it.
    """

    def __init__(self, identity: WorkerIdentity) -> None:
        self._identity = identity
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
            found = load_app(self._identity.app, ConfigError, Path(self._identity.folder))
            if not isinstance(found, ClientApp):
                raise ConfigError(f"{self._identity.app} must be a ClientApp; it is {type(found)}.")
            self._app = found
        return self._app


def release_device_memory() -> None:
    """Give back the device memory that a message needed, and that others may need until the next one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    """Serve until there is a reason to end; the exit code is 0 then.

    Args:
        arguments: Node, seconds without messages, open files (socket, lock, directory), identity.
    """
    node, idle = int(arguments[0]), float(arguments[1])
    listener, lock, folder = map(int, arguments[2:5])
    identity = WorkerIdentity.read(arguments[5])
    log_to_stderr(logging.WARNING)  # as a ClientApp
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its node decides what Ctrl-C means
    failpoints.switch_on_from(os.environ.get(failpoints.VARIABLE, ""))
    for descriptor in (listener, lock, folder):
        os.set_inheritable(descriptor, False)  # the lock is this process's, not its children's
    directory = WorkerDirectory(folder, Path(os.readlink(f"/proc/self/fd/{folder}")))
    try:
        node_process = NodeProcess.open(identity.node_process) if identity.run else None
    except WorkerError as error:
        logger.info("node=%d the worker ends as it starts: %s", node, error)
        directory.remove(node)
        return 0
    sockets = WorkerSockets(
        listener=socket.socket(fileno=listener),
        node=node,
        node_process=node_process,
        identity=identity,
        idle=idle,
        leave=lambda: directory.remove(node),
    )
    thread = threading.Thread(target=sockets.run, name="sockets", daemon=True)
    thread.start()
    if not identity.run:
        importlib.import_module(identity.app)
    loaded: LoadedApp | None = None
    while (job := sockets.jobs.get()) is not None:
        if loaded is None:
            loaded = LoadedApp(sockets.identity)
            sys.path[:] = sockets.identity.import_path
        sockets.reply(*loaded.answer(job))
        del job
        release_device_memory()
    thread.join()
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the node's log is gone
        raise SystemExit(main(sys.argv[1:]))
