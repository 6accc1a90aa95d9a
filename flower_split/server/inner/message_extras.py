"""Extra records in training messages: the base change, and the factors that stay with a client.

FLoRA and FedEx-LoRA put into the clients' base what their adapters do not hold; Fed-SB's clients need
the frozen factor of the core that they train; FedSA-LoRA leaves B with each client. All make a message
more than an adapter, so none goes with mods or with Flower's own strategies.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from flwr.app import ArrayRecord, Message, RecordDict

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterSpec
from flower_split.aggregation.core.method import Aggregator
from flower_split.errors import AggregationError, FederationError
from flower_split.lora.base_change import base_change_state
from flower_split.lora.core_training import core_columns_state
from flower_split.messages.arrays import to_arrays
from flower_split.messages.orders import PhaseOrder, PrivateOrder
from flower_split.messages.replies import private_digest
from flower_split.runs.private_factors import checked_digest

logger = logging.getLogger(__name__)


def method_notes(method: type[Aggregator]) -> list[str]:
    """Return what a reader of the report must know about a method and what it leaves behind."""
    notes = []
    if method.deviation:
        notes.append(
            f'strategy.aggregator = "{method.name}" differs from its paper (arXiv {method.paper}): '
            f"{method.deviation}."
        )
    if method.private:
        notes.append(
            f'strategy.aggregator = "{method.name}" is personalised: factor '
            f"{' and '.join(sorted(method.private))} of every module stays in each client's own "
            "directory, and there is no global model. adapters/client.safetensors has the shared "
            "factors with the initial ones; flower-split export RUN --client PARTITION gives one "
            "client's model."
        )
    if method.changes_base:
        notes.append(
            f'strategy.aggregator = "{method.name}" puts part of what is learnt beside the clients\' '
            "base weights: adapters/client.safetensors means something only together with "
            "adapters/base.safetensors. flower-split export puts both into one adapter."
        )
    return notes


def add_base_change(
    messages: Sequence[Message],
    aggregator: AdapterAggregator,
    spec_of: Callable[[Message], AdapterSpec],
) -> None:
    """Put base change and frozen columns into every message, for the modules its receiver holds.

    All of it every time: a client may be a new process, or one that missed rounds.

    Args:
        messages: Their contents are replaced, never changed: Flower's messages share theirs.
        aggregator: The aggregator that has them; where it has none, nothing is added.
        spec_of: What a message's receiver holds.
    """
    changes, columns = aggregator.base_changes(), aggregator.core_columns()
    if not changes and not columns:
        return
    records: dict[frozenset[str] | None, ArrayRecord] = {}
    for message in messages:
        held = spec_of(message).modules
        if held not in records:
            state = base_change_state(
                {name: one for name, one in changes.items() if held is None or name in held}
            ) | core_columns_state(
                {name: one for name, one in columns.items() if held is None or name in held}
            )
            records[held] = to_arrays(state)
        message.content = PhaseOrder(base_change=records[held]).write(message.content)
    size = max((record.count_bytes() for record in records.values()), default=0)
    logger.info("every message carries %.1f MB beside the adapter", size / 1e6)


def leave_private(
    message: Message,
    names: Sequence[str],
    *,
    digest: str,
    folder: str,
    arrays_key: str,
    optimizer: bool = False,
    personal: bool = False,
) -> None:
    """Say what stays with a client, and from which of its own values it goes on.

    Args:
        message: Its content is replaced. A client that has factors of its own is not sent any.
        names: The adapter's weights that stay with their client.
        digest: Digest of what the client kept in its last committed round; empty: it has none yet.
        folder: Where it keeps them if it is simulated.
        arrays_key: Key of the adapter's record.
        optimizer: Its optimizer's state stays with it, too.
        personal: So does a copy of what it has trained, which it evaluates beside the global adapter.
    """
    arrays = message.content.array_records[arrays_key]
    private = set(names) & set(arrays)
    order = PrivateOrder(
        names=tuple(sorted(private)),
        digest=digest,
        folder=folder,
        optimizer=optimizer,
        personal=personal,
    )
    content = PhaseOrder(private=order).write(message.content)
    if digest and private:
        shared = {name: arrays[name] for name in arrays if name not in private}
        content[arrays_key] = ArrayRecord(shared)
    message.content = content


def kept_digest(partition_id: int, content: RecordDict) -> Mapping[int, str]:
    """Return the digest of the factors that a client has kept, from its reply, by partition.

    Raises:
        AggregationError: The client does not say.
    """
    try:
        return {partition_id: checked_digest(private_digest(content))}
    except FederationError as error:
        raise AggregationError(f"client {partition_id}: {error}") from error
