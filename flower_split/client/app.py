"""The ClientApp: what a client answers. Data, labels and text stay here; adapters and numbers travel.

Each reply holds one ArrayRecord (full fp32 adapter weights, sorted names) and one MetricRecord, as
Flower's strategies and mods expect; per-step lists travel in a ConfigRecord of their own. An error
that this package raised on purpose travels as the reply's error, in its own words.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor

from flower_split.client.client import Client, TrunkOrder, planned_steps
from flower_split.client.privacy_mod import privacy_mod
from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import (
    FederationError,
    FlowerSplitError,
    RefusalReason,
    RoundAborted,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.lora import adapter_state, weight_norms
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.client_facts import (
    BASE_CHANGE,
    BASE_VALUES,
    HANDSHAKE,
    PRIVATE,
    PRIVATE_DIGEST,
    PRIVATE_FOLDER,
    STEPS,
    TRAINABLE,
    TURN,
    WEIGHT_NORMS,
    ClientFacts,
)
from flower_split.messages.error_codes import TRUNK_LOST
from flower_split.parties.client_ranks import own_lora
from flower_split.parties.parts import client_cuts
from flower_split.runs.private_factors import PrivateFolder, client_directory
from flower_split.runtime import failpoints
from flower_split.runtime.logs import log_to_stderr, quiet_libraries
from flower_split.runtime.simulation import simulated_clients_at_once

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

Handler = Callable[[Message, Context], RecordDict]


def _replies(handler: Handler) -> Callable[[Message, Context], Message]:
    """Make a Flower handler: the content as reply, and this package's errors in their own words."""

    @functools.wraps(handler)
    def run(message: Message, context: Context) -> Message:
        log_to_stderr(logging.WARNING)
        quiet_libraries()
        code = _RAISED
        try:
            return Message(handler(message, context), reply_to=message)
        except FlowerSplitError as error:
            if _is_loss(error):
                code = TRUNK_LOST
            logger.error("node=%d %s", context.node_id, error)
            reason = str(error)
        except (
            Exception
        ) as error:  # the edge: what nobody foresaw must reach the ServerApp in words
            logger.exception("node=%d an unexpected error", context.node_id)
            reason = f"an unexpected {type(error).__name__}: {error} (the client's log has the traceback)"
        return Message(Error(code=code, reason=reason), reply_to=message)

    return run


def _is_loss(error: FlowerSplitError) -> bool:
    """Whether the trunk or the round was lost, through no fault of this client's."""
    if isinstance(error, TrunkRefused):
        return error.reason in _LOSSES
    return isinstance(error, (RoundAborted, TrunkUnavailable))


@_replies
def query(message: Message, context: Context) -> RecordDict:
    """The handshake: what this client holds; or, asked for them, base values of its adapter."""
    config, client = _client(context)
    names = _names_of_base_values(message)
    if names is not None:
        return RecordDict({BASE_VALUES: to_arrays(client.base_values(names))})
    facts = ClientFacts(
        partition_id=client.partition_id,
        num_partitions=client.num_partitions,
        num_examples=len(client.data.train),
        num_eval_examples=len(client.data.evaluate),
        planned_steps=planned_steps(config, len(client.data.train)),
        concurrency=simulated_clients_at_once(),
        fingerprint=client.fingerprint,
        name=client.data.name,
        lora_rank=client.own.rank,
        lora_alpha=client.own.alpha,
        cuts=client.cuts,
        base_digests=client.base_digests(),
    )
    return RecordDict({HANDSHAKE: facts.to_record()})


@_replies
def train(message: Message, context: Context) -> RecordDict:
    """One round of training with the trunk, from the adapter in the message."""
    _, client = _client(context)
    order, own = _order(message), _private(message, context)
    failpoints.reach("client.train.begin")
    result = client.train(
        from_arrays(_arrays(message)) | own.values,
        order,
        _trainable(message),
        _base_change(message),
        _proximal_mu(message),
    )
    failpoints.reach("client.train.end")
    state = adapter_state(client.model)
    kept = own.keep(state, order.server_round)
    content = RecordDict(
        {
            "arrays": to_arrays({name: state[name] for name in state if name not in own.names}),
            "metrics": MetricRecord(dict(result.metrics)),
            **kept,
        }
    )
    if _asked(message, WEIGHT_NORMS):
        norms = weight_norms(client.model)
        content[WEIGHT_NORMS] = ConfigRecord({n: v.numpy().tobytes() for n, v in norms.items()})
    content[STEPS] = ConfigRecord({name: list(v) for name, v in result.steps.items()})
    return content


@_replies
def evaluate(message: Message, context: Context) -> RecordDict:
    """Held-out loss of the adapter in the message, with the trunk."""
    _, client = _client(context)
    adapter = from_arrays(_arrays(message)) | _private(message, context).values
    metrics = client.evaluate(adapter, _order(message), _base_change(message))
    return RecordDict({"metrics": MetricRecord(dict(metrics))})


@_replies
def train_local_only(message: Message, context: Context) -> RecordDict:
    """The baseline: train all three parts alone, on the own data, for as many steps as the run."""
    _, client = _client(context)
    state = client.train_alone()
    return RecordDict({"arrays": to_arrays(state)})


@_replies
def evaluate_local_only(message: Message, context: Context) -> RecordDict:
    """Held-out loss of every adapter in the message, by the name of its record, without a trunk."""
    _, client = _client(context)
    losses: dict[str, float] = {}
    for name, arrays in sorted(message.content.array_records.items()):
        result = client.evaluate_alone(from_arrays(arrays))
        losses[f"{name}.loss-sum"] = result.loss_sum
        losses[f"{name}.num-tokens"] = float(result.num_tokens)
    return RecordDict({"metrics": MetricRecord(dict(losses))})


def _client(context: Context) -> tuple[RunConfig, Client]:
    """This node's client.

    Raises:
        FederationError: The node does not know its partition.
    """
    config = parse_run_config(context.run_config)
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
    own = own_lora(config, numbers[0], context.node_config)
    cuts = client_cuts(config, numbers[0], context.node_config)
    return config, Client.of(config, numbers[0], numbers[1], own, cuts)


def _arrays(message: Message) -> ArrayRecord:
    named = message.content.array_records.items()
    records = [record for name, record in named if name != BASE_CHANGE]
    if len(records) != 1:
        raise FederationError(
            f"a message must carry one ArrayRecord; it carries {len(records)}. Use an inner "
            "strategy of flwr.serverapp.strategy."
        )
    return records[0]


def _base_change(message: Message) -> dict[str, Tensor]:
    """What the method adds to the base weights of this client; empty: nothing."""
    record = message.content.array_records.get(BASE_CHANGE)
    return {} if record is None else from_arrays(record)


def _names_of_base_values(message: Message) -> list[str] | None:
    """The names that the ServerApp asks for; None: it asks for something else."""
    for record in message.content.config_records.values():
        names = record.get("names")
        if record.get("purpose") == BASE_VALUES and isinstance(names, list):
            return [str(name) for name in names]
    return None


def _asked(message: Message, key: str) -> bool:
    """Whether the strategy asks for something by this key."""
    return any(record.get(key) is True for record in message.content.config_records.values())


def _trainable(message: Message) -> list[str] | None:
    """The weights that train in this round, where the strategy's method freezes others."""
    for record in message.content.config_records.values():
        names = record.get(TRAINABLE)
        if isinstance(names, list):
            return [str(name) for name in names]
    return None


@dataclass(frozen=True, slots=True)
class _Private:
    """The weights that stay with this client, by what a message says."""

    names: frozenset[str] = frozenset()
    digest: str = ""  # of its values after its last committed round; empty: it has none yet
    folder: PrivateFolder | None = None

    @property
    def values(self) -> dict[str, Tensor]:
        """Its own values; empty: it begins with those in the message."""
        return self.folder.read(self.digest) if self.folder is not None and self.digest else {}

    def keep(self, state: dict[str, Tensor], server_round: int) -> dict[str, ConfigRecord]:
        """Keep the round's values; returns what the reply says of them."""
        if self.folder is None:
            return {}
        own = {name: state[name] for name in self.names}
        digest = self.folder.write(own, server_round=server_round, base=self.digest)
        return {PRIVATE: ConfigRecord({"digest": digest})}


def _private(message: Message, context: Context) -> _Private:
    """What stays with this client, and where.

    Raises:
        ConfigError: It has no directory for it.
    """
    for record in message.content.config_records.values():
        names = record.get(PRIVATE)
        if isinstance(names, list):
            config, client = _client(context)
            directory = client_directory(
                config, context.node_config, str(record.get(PRIVATE_FOLDER, ""))
            )
            folder = PrivateFolder.of(directory, _order(message).experiment, client.partition_id)
            digest = str(record.get(PRIVATE_DIGEST, ""))
            return _Private(frozenset(str(name) for name in names), digest, folder)
    return _Private()


def _proximal_mu(message: Message) -> float:
    """The weight of FedProx's term, from the message of Flower's strategy; 0: it is none."""
    for record in message.content.config_records.values():
        value = record.get("proximal-mu")
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def _order(message: Message) -> TrunkOrder:
    """How to reach the trunk in this phase, from the message's ConfigRecord."""
    for record in message.content.config_records.values():
        if "trunk-token" in record:
            return TrunkOrder(
                address=str(record["trunk-address"]),
                token=str(record["trunk-token"]),
                root_certificates=str(record["trunk-root-certificates"]),
                server_round=int(str(record["server-round"])),
                turn=int(str(record.get(TURN, record["server-round"]))),
                experiment=str(record.get("experiment", "")),
            )
    raise FederationError(
        "the message does not say where the trunk is. The ServerApp must use "
        "flower_split.server.trunk_strategy.TrunkStrategy around its strategy."
    )


def make_client_app(mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp, with Flower's mods of your own around training.

    The mod that ``privacy.mechanism`` needs is there already, outside of yours: what it clips is
    what leaves the client. Mods are put around training alone, since Flower's own ones break every
    reply without an adapter. They see one ArrayRecord and one ConfigRecord, and in the reply the same
    weights in the same order.

    Args:
        mods: The first one is outermost, as in Flower.
    """
    made = ClientApp()
    made.query()(query)
    made.train(mods=[privacy_mod, *mods])(train)
    made.evaluate()(evaluate)
    made.train("local_only")(train_local_only)
    made.evaluate("local_only")(evaluate_local_only)
    return made


app = make_client_app()
