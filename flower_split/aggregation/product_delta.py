"""Product-delta: average what clients changed in ΔW, keep the global ΔW itself (ours, the default).

ΔW ← ΔW + η Σ wᵢ (sᵢ BᵢAᵢ − what client i was sent), recompressed to the maximum rank; a client gets
the leading components at its own rank and scale. Because a client's change is measured against
what that client was sent, a client of small rank does not pull the components it never saw towards
zero, which is how truncated averaging (FlexLoRA) loses them round by round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.base import Aggregator, checked_rank_scale, leading
from flower_split.aggregation.checks import Share, check_factors, check_updates
from flower_split.aggregation.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.lowrank import LowRankSum, factors_of, row_length, same_factors


def ordered_init(factors: Factors, max_rank: int | None) -> State:
    """The initial state of a method whose global factors are kept largest component first.

    Args:
        factors: The initial factors, already checked.
        max_rank: Components kept; None: all.
    """
    basis = factors.A.clone()
    state = State(factors=factors, basis=basis, scale=float(factors.scale))
    total = LowRankSum(factors.out_features, factors.in_features, device=basis.device)
    total.add(factors, 1.0)
    return replace(state, factors=factors_of(total.spectrum(max_rank), row_length(basis)))


def add_changes(total: LowRankSum, clients: Sequence[Share], factor: float) -> bool:
    """Add factor · Σ share · (returned − received) to ``total``.

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
        total.add(client.returned, factor * client.share)
        for index, (factors, share) in enumerate(sent[-8:], start=max(0, len(sent) - 8)):
            if same_factors(factors, client.received):
                sent[index] = (factors, share + client.share)
                break
        else:
            sent.append((client.received, client.share))
    for factors, share in sent:
        total.add(factors, -factor * share)
    return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductDelta(Aggregator):
    """The exact mean of the clients' changes of ΔW, at mixed ranks and scales.

    Args:
        max_rank: The rank the server recompresses ΔW to; None: no truncation.
        working_rank: Components kept while a round's sum is streamed; None: all, lossless.
    """

    name: ClassVar[str] = "product-delta"
    takes_learning_rate: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    working_rank: int | None = None

    def init(self, factors: Factors) -> State:
        """The initial state; see :class:`Aggregator`."""
        check_factors(factors, f"{self.name}: init got factors")
        return ordered_init(factors, self.max_rank)

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        total = LowRankSum(
            state.out_features,
            state.in_features,
            working_rank=self.working_rank,
            device=state.basis.device,
        )
        state = replace(state, server_round=state.server_round + 1)
        if not add_changes(total, clients, self.learning_rate):
            return AggregationResult(state)
        total.add(state.factors, 1.0)
        merged = factors_of(total.spectrum(self.max_rank), row_length(state.basis))
        return AggregationResult(replace(state, factors=merged))

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """The leading components; see :class:`Aggregator`."""
        rank, scale = checked_rank_scale(state, rank, scale)
        return leading(state, rank, scale, self.seed)
