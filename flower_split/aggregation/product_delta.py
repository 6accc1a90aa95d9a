"""Product-delta: average what clients changed in ΔW, keep the global ΔW itself (ours, the default).

ΔW ← ΔW + η Σ wᵢ (sᵢ BᵢAᵢ − what client i was sent), recompressed to the maximum rank; a client gets
the leading components at its own rank and scale. Because a client's change is measured against
what that client was sent, a client of small rank does not pull the components it never saw towards
zero, which is how truncated averaging (FlexLoRA) loses them round by round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.checks import Share, check_updates
from flower_split.aggregation.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.lowrank import LowRankSum, same_factors
from flower_split.aggregation.product import ProductAggregator


def add_changes(total: LowRankSum, clients: Sequence[Share]) -> bool:
    """Add Σ share · (returned − received) to ``total``.

    Clients of one rank and scale were sent the same factors, which are subtracted once.

    Returns:
        Whether anything was added: no client changed anything otherwise.
    """
    sent: list[tuple[Factors, float]] = []
    changed = False
    for client in clients:
        if client.share == 0 or same_factors(client.received, client.returned):
            continue
        changed = True
        total.add(client.returned, client.share)
        for index, (factors, share) in enumerate(sent[-8:], start=max(0, len(sent) - 8)):
            if same_factors(factors, client.received):
                sent[index] = (factors, share + client.share)
                break
        else:
            sent.append((client.received, client.share))
    for factors, share in sent:
        total.add(factors, -share)
    return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductDelta(ProductAggregator):
    """The exact mean of the clients' changes of ΔW, at mixed ranks and scales."""

    name: ClassVar[str] = "product-delta"

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        change = self.new_sum(state)
        changed = add_changes(change, check_updates(state, updates))
        state = replace(state, server_round=state.server_round + 1)
        if not changed and not state.extra:  # not even momentum: the same bits as before
            return AggregationResult(state)
        return AggregationResult(self.moved(state, change))
