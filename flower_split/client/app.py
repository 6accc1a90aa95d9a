"""The ClientApp: what Flower loads on a client, and who answers its messages.

In a deployment Flower starts a process for every message. The node's worker answers it there
(:mod:`flower_split.client.worker`), and this process loads neither torch nor transformers. Where there
is no worker, and in a simulation, whose processes are kept, it answers by itself.
"""

import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode

from flower_split.errors import FederationError, WorkerError
from flower_split.messages.local_only import ACTION
from flower_split.messages.packing import is_packed, packed, unpacked
from flower_split.runtime.loading import loading_modules
from flower_split.runtime.logs import log_to_stderr

if TYPE_CHECKING:
    from flower_split.client.handlers import Answers

logger = logging.getLogger(__name__)

_PROCESS_OF_A_MESSAGE = (
    "flwr-clientapp"  # Flower's command; every other process keeps what it loads
)


class SplitClientApp(ClientApp):
    """A ClientApp whose messages the node's worker answers, where Flower starts a process for each."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        reply = None
        if Path(sys.argv[0]).name == _PROCESS_OF_A_MESSAGE and wants_worker(context):
            reply = self._by_worker(message, context)
        return self._here(message, context) if reply is None else reply

    def _here(self, message: Message, context: Context) -> Message:
        """Answer in this process, a packed message with a packed reply."""
        if not (message.has_content() and is_packed(message)):
            return super().__call__(message, context)
        try:
            order = unpacked(message)
        except FederationError as error:
            logger.error("node=%d %s", context.node_id, error)
            return Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message
            )
        reply = super().__call__(order, context)
        return packed(reply) if reply.has_content() else reply

    def _by_worker(self, message: Message, context: Context) -> Message | None:
        """Return the worker's reply; None: this process has to answer, and the log says why."""
        from flower_split.client.worker.asking import ReadyWorker
        from flower_split.client.worker.directory import WorkerDirectory
        from flower_split.client.worker.identity import WorkerIdentity

        log_to_stderr(logging.WARNING)
        try:
            identity = WorkerIdentity.here(self, context)
            with WorkerDirectory.open() as directory:
                with ReadyWorker.get(directory, context.node_id, identity) as worker:
                    return worker.answer(message, context)
        except WorkerError as error:
            logger.warning(
                "node=%d not answered by the node's worker: %s This process answers by itself: the same "
                "result, after loading model and data again.",
                context.node_id,
                error,
            )
            return None


def wants_worker(context: Context) -> bool:
    """Return whether the node's messages shall be answered by a worker.

    ``client-worker`` of the node config decides, and then ``train.client-worker`` of the run's. The
    handlers refuse what is neither auto nor off, in this process.
    """
    own = context.node_config.get("client-worker")
    return (own or context.run_config.get("train.client-worker", "auto")) == "auto"


class _Later:
    """Holds what answers, which loads torch and transformers, from the first message on."""

    @cached_property
    def answers(self) -> "Answers":
        """The handlers."""
        with loading_modules():
            from flower_split.client.handlers import Answers

        return Answers()

    def private(self, message: Message, context: Context, train: ClientAppCallable) -> Message:
        """Answer as the mod for ``privacy.mechanism`` does."""
        return self.answers.private(message, context, train)


def make_client_app(mods: Sequence[Mod] = ()) -> ClientApp:
    """Make the ClientApp, with Flower's mods of your own around training.

    The mod that ``privacy.mechanism`` needs is there already, outside of yours: what it clips is
    what leaves the client. Mods are put around training alone, since Flower's own ones break every
    reply without an adapter. They see one ArrayRecord and one ConfigRecord, and in the reply the same
    weights in the same order.

    In a deployment the mods run in the node's worker, which lives for a whole run. So that it can be
    found there, the app's ``pyproject.toml`` names the object itself, as Flower wants it.

    Args:
        mods: The first one is outermost, as in Flower.
    """
    later, made = _Later(), SplitClientApp()
    made.query()(lambda message, context: later.answers.query(message, context))
    made.train(mods=[later.private, *mods])(
        lambda message, context: later.answers.train(message, context)
    )
    made.evaluate()(lambda message, context: later.answers.evaluate(message, context))
    made.train(ACTION)(lambda message, context: later.answers.train_local_only(message, context))
    made.evaluate(ACTION)(
        lambda message, context: later.answers.evaluate_local_only(message, context)
    )
    return made


app = make_client_app()
