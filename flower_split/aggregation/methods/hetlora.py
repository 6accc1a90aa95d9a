"""HetLoRA: pad factors of different ranks with zeros, weight clients by the size of their ΔW.

Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. Yae Jee Cho, Luyang
Liu, Zheng Xu, Aldi Fahrezi, Gauri Joshi. EMNLP 2024, arXiv 2401.06432.

Client i's share is ‖ΔW_i‖_F / Σ ‖ΔW_j‖_F: the sample counts that come as weights play no part (but
are still checked). Clients get the leading rows of A and columns of B. The paper's clients may also
prune their own rank; here a client has the rank it asks for. Rows that no client of a round has
keep the server's values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share, check_updates
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import inner_product
from flower_split.aggregation.core.method import Aggregator, checked_rank_scale, leading


def _sparsity_shares(clients: Sequence[Share]) -> list[float]:
    norms = [max(inner_product(one.returned, one.returned), 0.0) ** 0.5 for one in clients]
    total = sum(norms)
    if total == 0:  # nobody has moved from B = 0 yet
        return [1 / len(clients)] * len(clients)
    return [norm / total for norm in norms]


@dataclass(frozen=True, kw_only=True, slots=True)
class HetLoRA(Aggregator):
    """A ← Σ v pad(A), B ← Σ v pad(B), v by ‖ΔW‖_F."""

    name: ClassVar[str] = "hetlora"
    mixed_ranks: ClassVar[bool] = True
    counts_weights: ClassVar[bool] = False

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        old = state.factors
        present = max(client.returned.rank for client in clients)
        a: Tensor = torch.zeros(present, state.in_features, dtype=torch.float64)
        b: Tensor = torch.zeros(state.out_features, present, dtype=torch.float64)
        a, b = a.to(old.A.device), b.to(old.B.device)
        for client, share in zip(clients, _sparsity_shares(clients), strict=True):
            own = client.returned
            a[: own.rank] += share * own.A.to(a.device, torch.float64)
            b[:, : own.rank] += share * (own.scale / old.scale) * own.B.to(b.device, torch.float64)
        factors = Factors(
            torch.cat([a.float(), old.A[present:]]),
            torch.cat([b.float(), old.B[:, present:]], dim=1),
            old.scale,
        )
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """The leading rows and columns; see :class:`Aggregator`."""
        rank, scale = checked_rank_scale(state, rank, scale)
        return leading(state, rank, scale, self.seed)
