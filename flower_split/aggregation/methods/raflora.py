"""raFLoRA: average each component over the clients that have it.

Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity. Fei Wu, Jia Hu,
Geyong Min, Shiqiang Wang. arXiv 2602.13486.

Component p of a ΔW is s B[:, p] A[p]. The mean of component p runs over the clients of rank above
p, with their shares made to sum to 1; the sum of all components is then decomposed by SVD, and a
client gets the leading ones. Clients of small rank thus do not dilute what they never had.
Components that no client of a round has keep the server's value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import check_factors, check_updates
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, factors_of, row_length
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import held_shares
from flower_split.aggregation.methods.product_family import ordered_init


@dataclass(frozen=True, kw_only=True, slots=True)
class RaFLoRA(Aggregator):
    """ΔW ← Σ_p mean of component p over the clients of rank above p.

    Args:
        max_rank: Components the server keeps; None: the largest rank among the clients and the
            initial adapter.
    """

    name: ClassVar[str] = "raflora"
    paper: ClassVar[str] = "2602.13486"
    exactness: ClassVar[str] = "none: each component over its holders"
    deviation: ClassVar[str] = "components that no client of a round has keep the server's values"
    mixed_ranks: ClassVar[bool] = True
    recompresses: ClassVar[bool] = True

    def init(self, factors: Factors) -> State:
        """Return the initial state; see :class:`Aggregator`."""
        check_factors(factors, f"{self.name}: init got factors")
        return ordered_init(factors, self.max_rank)

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = [client for client in check_updates(state, updates) if client.share > 0]
        present = max(client.returned.rank for client in clients)
        total = LowRankSum(state.out_features, state.in_features, device=state.basis.device)
        held = held_shares(clients, present).to(state.basis.device)
        for client in clients:
            own = client.returned
            weights = own.scale * client.share / held[: own.rank]
            b = own.B.to(state.basis.device, torch.float64)
            total.add_product(b * weights, own.A.to(state.basis.device, torch.float64))
        old = state.factors
        if old.rank > present:
            total.add(Factors(old.A[present:], old.B[:, present:], old.scale), 1.0)
        largest = max(present, old.rank, int(state.basis.shape[0]))
        spectrum = total.spectrum(self.max_rank or largest)
        return AggregationResult(
            replace(
                state,
                factors=factors_of(spectrum, row_length(state.basis)),
                server_round=state.server_round + 1,
            )
        )
