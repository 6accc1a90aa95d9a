"""Check that clients which share their gradients are the same client, bit for bit.

With ``train.sync = "gradients"`` all clients take the same optimizer steps from the same adapter and
the same optimizer state. Aggregating their replies must change nothing.
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, Message

from flower_split.errors import FederationError
from flower_split.messages.replies import private_digest, sole_adapter
from flower_split.server.federation.nodes import Federation

_REMEDY = (
    "All clients must compute on the same kind of device, with the same version of torch and of "
    "flower_split, and with the settings of the run"
)


def check_synchronised(
    replies: Mapping[int, Message], federation: Federation, server_round: int
) -> None:
    """Check that all replies have the same adapter and name the same optimizer state.

    Args:
        replies: By partition.
        federation: The run's nodes.
        server_round: For the error.

    Raises:
        FederationError: One differs; the first that does is named.
    """
    first = min(replies)
    adapter, digest = sole_adapter(replies[first].content), private_digest(replies[first].content)
    for partition_id in sorted(replies):
        content = replies[partition_id].content
        name = _difference(adapter, sole_adapter(content))
        if not name and private_digest(content) != digest:
            name = "the state of its optimizer"
        if name:
            raise FederationError(
                f'round {server_round}: train.sync = "gradients" makes all clients equal, but partition '
                f"{partition_id} (node {federation.nodes[partition_id]}) differs from partition {first} "
                f"in {name}. {_REMEDY}."
            )


def check_unchanged(arrays: ArrayRecord, replies: Mapping[int, Message], server_round: int) -> None:
    """Check that the aggregate of equal replies is what they hold.

    Raises:
        FederationError: It is another one.
    """
    name = _difference(sole_adapter(replies[min(replies)].content), arrays)
    if name:
        raise FederationError(
            f'round {server_round}: with train.sync = "gradients" the aggregation must leave the '
            f'clients\' adapter as it is; it changed {name}. Set strategy.aggregator = "fedit", '
            "without rules and without a strategy of your own that steps on the mean."
        )


def _difference(one: ArrayRecord, other: ArrayRecord) -> str:
    """Return the first name whose arrays are not the same bits; empty: they all are."""
    names: set[str] = {*one, *other}
    for name in sorted(names):
        if name not in one or name not in other:
            return name
        mine, theirs = one[name].numpy(), other[name].numpy()
        if mine.dtype != theirs.dtype or not np.array_equal(mine, theirs):
            return name
    return ""
