"""Product-delta: average what clients changed in ΔW, keep the global ΔW itself (ours, the default).

ΔW ← ΔW + η Σ wᵢ (sᵢ BᵢAᵢ − what client i was sent), recompressed to the maximum rank; a client gets
the leading components at its own rank and scale. Because a client's change is measured against
what that client was sent, a client of small rank does not pull the components it never saw towards
zero, which is how truncated averaging (FlexLoRA) loses them round by round.

Under mixed ranks the exact mean counts a client as not having moved the components it was not sent,
so those move slowly. ``rank_weighting = "holders"`` averages the change of component p over the
clients of rank above p alone, as raFLoRA does with the components themselves (arXiv 2602.13486): the
mean is no longer that of ΔW, and depends on how clients factor it, but a direction that only large
clients can train is trained at full speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import Share, check_updates
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, same_factors
from flower_split.aggregation.methods.means import held_shares
from flower_split.aggregation.methods.product_family import ProductAggregator
from flower_split.errors import AggregationError


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


def add_changes_by_component(total: LowRankSum, clients: Sequence[Share]) -> bool:
    """Add Σ over components of the holders' mean change to ``total``; see the module.

    Returns:
        As :func:`add_changes`.
    """
    active = [client for client in clients if client.share > 0]
    held = held_shares(active, max(client.returned.rank for client in active))
    changed = False
    for client in active:
        if same_factors(client.received, client.returned):
            continue
        changed = True
        for factors, sign in ((client.returned, 1.0), (client.received, -1.0)):
            weights = sign * factors.scale * client.share / held[: factors.rank]
            total.add_product(factors.B.double() * weights.to(factors.B.device), factors.A.double())
    return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductDelta(ProductAggregator):
    """The exact mean of the clients' changes of ΔW, at mixed ranks and scales.

    Args:
        rank_weighting: Over whom a component's change is averaged: ``all`` clients (exact), or its
            ``holders``.
    """

    name: ClassVar[str] = "product-delta"
    exactness: ClassVar[str] = "exact, before truncation to max_rank"

    rank_weighting: str = "all"

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        ProductAggregator.__post_init__(self)
        if self.rank_weighting not in ("all", "holders"):
            raise AggregationError(
                f"product-delta's rank_weighting must be all or holders; it is "
                f"{self.rank_weighting!r}."
            )

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        change = self.new_sum(state)
        add = add_changes if self.rank_weighting == "all" else add_changes_by_component
        changed = add(change, check_updates(state, updates))
        state = replace(state, server_round=state.server_round + 1)
        moves = bool(state.extra) or self.optimizer().adaptive
        if not changed and not moves:  # not even momentum: the same bits as before
            return AggregationResult(state)
        return AggregationResult(self.moved(state, change))
