"""Validate training replies before aggregation."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from flower_split.aggregation.adapter_aggregator import RoundSummary
from flower_split.errors import FederationError
from flower_split.messages.replies import NUM_TOKENS, scalars
from flower_split.protocol.values import RoundReport
from flower_split.server.federation.nodes import Federation


def completed(
    good: Mapping[int, Message], problems: Mapping[int, str], report: RoundReport
) -> tuple[dict[int, Message], dict[int, str]]:
    """Drop the replies of partitions whose contributions the trunk does not have in full.

    Returns:
        ``(kept replies, problems with the dropped ones added)``, by partition.
    """
    kept, left = dict(good), dict(problems)
    for item in report.slots:
        if item.slot in kept and not item.completed:
            left[item.slot] = (
                f"the trunk left it out: {item.problem or 'contributions are missing'}"
            )
            del kept[item.slot]
    return kept, dict(sorted(left.items()))


@runtime_checkable
class Excluding(Protocol):
    """An inner strategy that can leave out malformed updates by itself."""

    excludes_invalid: bool
    """True: it leaves them out; False: it refuses the round."""
    last_summary: RoundSummary
    """The summary of the round it aggregated last; ``excluded`` is by partition."""


def excluded_by(inner: Strategy) -> dict[int, str]:
    """Return why the inner strategy left out clients' adapters of its last round, by partition."""
    if not isinstance(inner, Excluding):
        return {}
    return {
        int(partition_id): f"its adapter was left out: {why}"
        for partition_id, why in inner.last_summary.excluded.items()
    }


def check_values(
    replies: Mapping[int, Message], federation: Federation, server_round: int, inner: Strategy
) -> None:
    """Check that what is aggregated is finite and was trained on something.

    Adapters are not checked where ``inner`` does so itself and leaves out the malformed ones.

    Raises:
        FederationError: A reply holds NaN or Inf, or no client trained on a label token.
    """
    checks_itself = isinstance(inner, Excluding) and inner.excludes_invalid
    for partition_id, reply in replies.items():
        for record in () if checks_itself else reply.content.array_records.values():
            for name, array in record.items():
                if not np.isfinite(array.numpy()).all():
                    raise FederationError(
                        f"round {server_round}: partition {partition_id} (node "
                        f"{federation.nodes[partition_id]}) returned NaN or Inf in {name}. Lower "
                        "train.optimizer.learning-rate, or check that client's data."
                    )
    if all(scalars(reply.content).get(NUM_TOKENS) == 0 for reply in replies.values()):
        raise FederationError(
            f"round {server_round}: no client trained on a label token, so there is nothing to "
            "aggregate. Give the clients examples with labels."
        )
