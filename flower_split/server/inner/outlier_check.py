"""Check that no client moved the adapter far more than the others, before a strategy of Flower's.

This package's own aggregation looks at ΔW and checks for itself
(:mod:`flower_split.aggregation.core.outliers`); Flower's average A and B as they are, so these are
looked at here.
"""

from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from flower_split.aggregation.core.outliers import above_median, allowances
from flower_split.errors import FederationError
from flower_split.messages.replies import NUM_TOKENS, scalars
from flower_split.messages.updates import update_norm
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.reply_checks import sent_arrays
from flower_split.server.inner.state import chain


def check_moves(
    inner: Strategy,
    replies: Mapping[int, Message],
    messages: Mapping[int, Message],
    federation: Federation,
    server_round: int,
    factor: float,
) -> None:
    """Check the lengths of the clients' updates against their median.

    Args:
        inner: The strategy that will aggregate them.
        replies: By partition, of the form that was sent.
        messages: By partition, what was sent.
        federation: The run's nodes.
        server_round: For errors.
        factor: Multiple of the median, for a client of the median number of tokens or fewer; 0: no bound.

    Raises:
        FederationError: A client's is longer; it is named.
    """
    if factor == 0 or isinstance(list(chain(inner))[-1], LoraFedAvg):
        return
    sent = sent_arrays(messages)
    tokens = {
        partition_id: float(scalars(reply.content).get(NUM_TOKENS, 0.0))
        for partition_id, reply in replies.items()
    }
    reach = allowances(tokens)
    distances = {
        partition_id: update_norm(sent[partition_id], returned) / reach[partition_id]
        for partition_id, reply in replies.items()
        for returned in reply.content.array_records.values()
    }
    for partition_id, multiple in sorted(above_median(distances, factor).items()):
        raise FederationError(
            f"round {server_round}: partition {partition_id} (node {federation.nodes[partition_id]}) "
            f"moved its adapter by {multiple:.4g} times the median of the round's clients; it may be "
            f"{factor:g} times (strategy.outlier-factor). Look at its data and its version of the app, "
            "or raise the key."
        )
