"""Checks before and after a strategy of Flower's, which takes its replies on trust.

Flower's averaging broadcasts other shapes, believes any weight, and may leave fp32; its clipping
divides by the length of an update. This package's own aggregation checks for itself.
"""

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    Strategy,
)

from flower_split.errors import FederationError
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.orders import sent_adapter
from flower_split.messages.replies import NUM_EXAMPLES, NUM_TOKENS, UNIFORM_WEIGHT, scalars
from flower_split.messages.updates import move_zero_update
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.clip_check import check_clipped
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.state import AdaptiveClipping, FixedClipping, chain

_CLIENT_SIDE = (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)


def check_for_inner(
    inner: Strategy,
    replies: Mapping[int, Message],
    messages: Mapping[int, Message],
    federation: Federation,
    server_round: int,
    largest_weights: Mapping[str, Mapping[int, float]],
) -> None:
    """Check replies before a strategy of Flower's; an update of zero is moved where one clips.

    Args:
        inner: The strategy that will aggregate them.
        replies: By partition.
        messages: By partition, what was sent.
        federation: The run's nodes.
        server_round: For errors.
        largest_weights: As for :func:`check_like_sent`.

    Raises:
        FederationError: As for :func:`check_like_sent`; or a client did not clip where the wrapper
            relies on it.
    """
    parts = list(chain(inner))
    if isinstance(parts[-1], LoraFedAvg):
        return
    sent = sent_arrays(messages)
    check_like_sent(replies, sent, federation, server_round, largest_weights)
    for part in parts:
        if isinstance(part, (*FixedClipping, *AdaptiveClipping)):
            for partition_id, reply in replies.items():
                if isinstance(part, _CLIENT_SIDE):
                    who = f"partition {partition_id} (node {federation.nodes[partition_id]})"
                    check_clipped(reply, sent[partition_id], part.clipping_norm, who, server_round)
                move_zero_update(reply, sent[partition_id])


def check_like_sent(
    replies: Mapping[int, Message],
    sent: Mapping[int, ArrayRecord],
    federation: Federation,
    server_round: int,
    largest_weights: Mapping[str, Mapping[int, float]],
) -> None:
    """Check what Flower's strategies take on trust: names, shapes and types as sent, sane weights.

    Args:
        replies: By partition.
        sent: By partition, what the client was sent.
        federation: The run's nodes.
        server_round: For the error.
        largest_weights: Metric by which clients are weighed, to the largest value of it that the
            client of a partition can report truthfully.

    Raises:
        FederationError: A reply's tensors differ in names or order from those that its client was
            sent (Flower would broadcast them), or a count is no number of at least 0; the client is
            named.
    """
    for partition_id, reply in replies.items():
        who = f"round {server_round}: partition {partition_id} (node {federation.nodes[partition_id]})"
        records = list(reply.content.array_records.values())
        if len(records) != 1 or list(records[0]) != list(sent[partition_id]):
            raise FederationError(
                f"{who} returned tensors whose names or order differ from those it was sent: "
                "Flower's strategies and mods need them equal, in one ArrayRecord. Run the same version "
                "of the app on every machine."
            )
        for name, array in records[0].items():
            expected = sent[partition_id][name]
            if (tuple(array.shape), array.dtype) != (tuple(expected.shape), expected.dtype):
                raise FederationError(
                    f"{who} returned {name} as {array.dtype} {list(array.shape)}; it was sent "
                    f"{expected.dtype} {list(expected.shape)}. Use one rank and scale for all "
                    'clients, or strategy.name = "lora-fedavg".'
                )
        for key in (NUM_TOKENS, NUM_EXAMPLES):
            value = scalars(reply.content).get(key)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise FederationError(
                    f"{who} returned {key} = {value}; it must be a number of at least 0. Check "
                    "that client's data."
                )
        for key, largest in largest_weights.items():
            value, most = scalars(reply.content).get(key), largest.get(partition_id)
            if value is not None and most is not None and value > most:
                raise FederationError(
                    f"{who} reports {key} = {value:g}, but its steps, batch size and sequence length "
                    f"allow at most {most:g} in a round. Either its report is wrong, or its "
                    "train.* settings differ from the run's."
                )


def sent_arrays(messages: Mapping[int, Message]) -> dict[int, ArrayRecord]:
    """Return the adapter in every message, by partition."""
    return {
        partition_id: sent_adapter(message.content) for partition_id, message in messages.items()
    }


def weighs_uniformly(inner: Strategy) -> bool:
    """Return whether the innermost strategy weighs clients by ``UNIFORM_WEIGHT``."""
    return any(getattr(part, "weighted_by_key", "") == UNIFORM_WEIGHT for part in chain(inner))


def checked_result(inner: Strategy, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
    """Return an inner strategy's adapter in fp32, which some of Flower's do not keep.

    Raises:
        FederationError: It is not finite.
    """
    for name, array in arrays.items():
        if not np.isfinite(array.numpy()).all():
            raise FederationError(
                f"round {server_round}: the inner strategy {type(inner).__name__} made NaN or Inf of "
                f"finite replies, in {name}. Lower its server learning rate (strategy.options, such "
                "as eta) or its noise."
            )
    if all(array.dtype == "float32" for array in arrays.values()):
        return arrays
    return to_arrays(from_arrays(arrays))
