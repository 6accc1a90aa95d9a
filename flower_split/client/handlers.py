"""What a client answers. Data, labels and text stay here; adapters and numbers travel.

Each handler reads its typed order, has the client work, and writes its typed reply
(:mod:`flower_split.messages`). An error that this package raised on purpose travels as the reply's
error, in its own words.

Importing this module loads torch and transformers; :mod:`flower_split.client.app` does so when the first
message is answered in its process.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from flower_split.client.alone import evaluate_alone, train_alone
from flower_split.client.client import Client
from flower_split.client.kept_key import kept_key, made_key
from flower_split.client.kept_state import NOTHING_KEPT, KeptState
from flower_split.client.model_cache import ClientCache
from flower_split.client.node_route import NodeRoute
from flower_split.client.privacy_mod import PrivacyMod
from flower_split.config.train import CLIENT_WORKERS
from flower_split.config.validation import one_of
from flower_split.errors import (
    FederationError,
    FlowerSplitError,
    KeyLost,
    RefusalReason,
    RoundAborted,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.lora import adapter_state, weight_norms
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.error_codes import KEY_LOST, TRUNK_LOST
from flower_split.messages.local_only import (
    LocalOnlyEvaluateOrder,
    LocalOnlyEvaluateReply,
    LocalOnlyTrainOrder,
    LocalOnlyTrainReply,
)
from flower_split.messages.orders import (
    BaseValuesOrder,
    EvaluateOrder,
    PhaseOrder,
    TrainOrder,
    read_query,
    sent_adapter,
)
from flower_split.messages.replies import LOSS_SUM, BaseValuesReply, EvaluateReply, TrainReply
from flower_split.parties.client_ranks import own_lora
from flower_split.parties.parts import client_cuts
from flower_split.runs.private_factors import PrivateFolder, client_directory
from flower_split.runtime import failpoints
from flower_split.runtime.log_fields import PROCESS_FIELDS
from flower_split.runtime.logs import log_to_stderr, quiet_libraries
from flower_split.runtime.simulation import simulated_clients_at_once
from flower_split.runtime.tracing import PROCESS_TRACING

logger = logging.getLogger(__name__)

_RAISED = 2  # Flower's error code for an exception of the ClientApp

_LOSSES = (
    RefusalReason.WRONG_EPOCH,
    RefusalReason.WRONG_ATTEMPT,
    RefusalReason.UNKNOWN_SESSION,
    RefusalReason.STALE_VERSION,
    RefusalReason.NO_ROUND,
    RefusalReason.UNAUTHENTICATED,  # of a round that was replaced: its tokens are gone
)


PROCESS_CACHE = ClientCache()
"""Lives as long as the process: a simulation unpickles the app anew for every message."""

Handler = Callable[[Message, Context], RecordDict]


class Handlers:
    """One handler for each message that a client answers.

    Args:
        cache: What this process keeps between messages.
    """

    def __init__(self, cache: ClientCache) -> None:
        self._cache = cache

    def query(self, message: Message, context: Context) -> RecordDict:
        """Say what this client holds; or, asked for them, give base values of its adapter."""
        order, client = read_query(message.content), self._client(context)
        if isinstance(order, BaseValuesOrder):
            return BaseValuesReply(to_arrays(client.base_values(order.names))).write()
        return replace(
            client.facts(simulated_clients_at_once()),
            ignored_keys=self._cache.ignored_keys,
            public_key=made_key(context).public,
        ).write()

    def train(self, message: Message, context: Context) -> RecordDict:
        """Train one round with the trunk, from the adapter in the message."""
        client, order = self._client(context), TrainOrder.read(message.content)
        _begin(order, client)
        kept = self._kept(client, order, context)
        failpoints.reach("client.train.begin")
        adapter = from_arrays(sent_adapter(message.content)) | kept.values
        result = client.train(adapter, order, _base_change(order), kept.optimizer_state)
        failpoints.reach("client.train.end")
        state = adapter_state(client.model)
        digest = kept.write(state, result.optimizer_state, order.trunk.server_round)
        norms = weight_norms(client.model) if order.wants_weight_norms else {}
        reply = TrainReply(
            adapter=to_arrays({name: state[name] for name in state if name not in kept.names}),
            train_loss=result.loss,
            num_tokens=result.num_tokens,
            num_examples=result.num_examples,
            bytes_sent=result.bytes_sent,
            bytes_received=result.bytes_received,
            steps=result.step_lists(),
            weight_norms={name: values.numpy().tobytes() for name, values in norms.items()},
            private_digest=digest,
        )
        return reply.write()

    def evaluate(self, message: Message, context: Context) -> RecordDict:
        """Evaluate the adapter in the message on held-out data, with the trunk."""
        client, order = self._client(context), EvaluateOrder.read(message.content)
        _begin(order, client)
        kept = self._kept(client, order, context)
        adapter = from_arrays(sent_adapter(message.content)) | kept.values
        personal = kept.personal if kept.keeps_personal else None
        result = client.evaluate(adapter, order, _base_change(order), personal)
        own = result.personal
        return EvaluateReply(
            loss_sum=result.loss_sum,
            num_tokens=result.num_tokens,
            num_examples=result.num_examples,
            bytes_sent=result.bytes_sent,
            bytes_received=result.bytes_received,
            sums=result.sums,
            personal={} if own is None else {LOSS_SUM: own.loss_sum, **own.sums},
        ).write()

    def train_local_only(self, message: Message, context: Context) -> RecordDict:
        """Train all three parts alone, on the own data, for as many steps as the run."""
        LocalOnlyTrainOrder.read(message.content)
        state = train_alone(self._client(context))
        return LocalOnlyTrainReply(to_arrays(state)).write()

    def evaluate_local_only(self, message: Message, context: Context) -> RecordDict:
        """Evaluate every adapter in the message on held-out data, without a trunk."""
        client, losses = self._client(context), {}
        adapters = LocalOnlyEvaluateOrder.read(message.content).adapters
        for trained_by, record in sorted(adapters.items()):
            result = evaluate_alone(client, from_arrays(record))
            losses[trained_by] = (result.loss_sum, result.num_tokens)
        return LocalOnlyEvaluateReply(losses).write()

    def _client(self, context: Context) -> Client:
        """Return this node's client.

        Raises:
            FederationError: The node does not know its partition.
            ConfigError: Something else in its node config is wrong.
        """
        config = self._cache.config(context.run_config)
        worker = str(context.node_config.get("client-worker") or "auto")
        one_of("client-worker in this node's --node-config", worker, CLIENT_WORKERS)
        numbers = []
        for key in ("partition-id", "num-partitions"):
            value = context.node_config.get(key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise FederationError(
                    f"every SuperNode must know its data partition, but the node config has {key} = "
                    f"{value!r}. Start it with: flower-supernode … --node-config 'partition-id=0 "
                    f"num-partitions={config.num_clients}', each with its own partition-id."
                )
            numbers.append(value)
        return Client(
            self._cache.of(config),
            partition_id=numbers[0],
            num_partitions=numbers[1],
            own=own_lora(config, numbers[0], context.node_config),
            cuts=client_cuts(config, numbers[0], context.node_config),
            route=NodeRoute.of(config.trunk, context.node_config, kept_key(context)),
        )

    def _kept(self, client: Client, order: PhaseOrder, context: Context) -> KeptState:
        """Return what stays with this client, by what the order says.

        Raises:
            ConfigError: It has no directory for it.
        """
        if order.private is None:
            return NOTHING_KEPT
        directory = client_directory(client.config, context.node_config, order.private.folder)
        folder = PrivateFolder.of(directory, order.trunk.experiment, client.partition_id)
        return KeptState(
            frozenset(order.private.names),
            order.private.digest,
            folder,
            order.private.optimizer,
            order.private.personal,
        )


def _say_who(message: Message, context: Context) -> None:
    """Have this process's log lines name the run and the node.

    Ray pickles the handlers with whatever of this module they name themselves, but functions by name.
    """
    PROCESS_FIELDS.bind(run=message.metadata.run_id, node=context.node_id)


def _begin(order: PhaseOrder, client: Client) -> None:
    """Have this process's log lines name the round, and check that its token can be used.

    Raises:
        KeyLost: It was made for another key.
    """
    trunk = order.trunk
    PROCESS_FIELDS.bind(
        experiment=trunk.experiment,
        round=trunk.server_round,
        attempt=trunk.attempt,
        slot=client.partition_id,
    )
    client.route.key_of(trunk)


def _base_change(order: PhaseOrder) -> dict[str, Tensor]:
    """Return what the method adds to the base weights of this client; empty: nothing."""
    return {} if order.base_change is None else from_arrays(order.base_change)


def _replies(handler: Handler) -> Callable[[Message, Context], Message]:
    """Make a Flower handler: the content as reply, and this package's errors in their own words."""

    @functools.wraps(handler)
    def run(message: Message, context: Context) -> Message:
        log_to_stderr(logging.WARNING)
        _say_who(message, context)
        PROCESS_TRACING.switch_on_from(os.environ, "flower-split-client")
        quiet_libraries()
        code = _RAISED
        try:
            return Message(handler(message, context), reply_to=message)
        except FlowerSplitError as error:
            if _is_loss(error):
                code = TRUNK_LOST
            if isinstance(error, KeyLost):
                code = KEY_LOST
            logger.error("node=%d %s", context.node_id, error)
            reason = str(error)
        except Exception as error:
            # The edge: what nobody foresaw must reach the ServerApp in words.
            logger.exception("node=%d an unexpected error", context.node_id)
            reason = f"an unexpected {type(error).__name__}: {error} (the client's log has the traceback)"
        finally:
            PROCESS_TRACING.flush()
        return Message(Error(code=code, reason=reason), reply_to=message)

    return run


def _is_loss(error: FlowerSplitError) -> bool:
    """Return whether the trunk or the round was lost, through no fault of this client's."""
    if isinstance(error, TrunkRefused):
        return error.reason in _LOSSES
    return isinstance(error, (RoundAborted, TrunkUnavailable))


class Answers:
    """Flower's side of the handlers: each makes a whole reply, and never raises."""

    def __init__(self) -> None:
        cache = PROCESS_CACHE
        handlers = Handlers(cache)
        self.query = _replies(handlers.query)
        self.train = _replies(handlers.train)
        self.evaluate = _replies(handlers.evaluate)
        self.train_local_only = _replies(handlers.train_local_only)
        self.evaluate_local_only = _replies(handlers.evaluate_local_only)
        self._private = PrivacyMod(cache)

    def private(self, message: Message, context: Context, train: ClientAppCallable) -> Message:
        """Answer as ``train`` does, clipped and noised as ``privacy.mechanism`` says."""
        return self._private(message, context, train)
