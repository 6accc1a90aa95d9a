"""FedSVD: average B, then turn the product so that A has orthonormal rows.

FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA. Seanie Lee, Sangwoo
Park, Dong Bok Lee, Dominik Wagner, Haebin Seong, Tobias Bocklet, Juho Lee, Sung Ju Hwang.
NeurIPS 2025, arXiv 2505.12805.

Clients train B with A frozen, so Σ w B · A is exact; its SVD U S Vᵀ gives the next A = Vᵀ and
B = U S. The row space stays that of the first A: only its basis turns, towards what was learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator, padded
from flower_split.aggregation.methods.means import mean_b, note_frozen, step_towards


@dataclass(frozen=True, kw_only=True, slots=True)
class FedSVD(Aggregator):
    """B ← Σ w B, then B A ← U S · Vᵀ."""

    name: ClassVar[str] = "fedsvd"
    paper: ClassVar[str] = "2505.12805"
    exactness: ClassVar[str] = "exact"
    takes_learning_rate: ClassVar[bool] = True

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        note_frozen(self.name, clients, "A")
        old = state.factors
        b = step_towards(old.B, mean_b(clients, old.scale), self.learning_rate)
        # With B = L R and A = (Q T)ᵀ the SVD of the [r, r] matrix R Tᵀ is enough. Its full right
        # basis keeps A at rank r when B has less.
        left, r = torch.linalg.qr(b.double())
        basis, t = torch.linalg.qr(old.A.double().T)
        u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=True)
        rows, kept = int(vh.shape[0]), int(s.shape[0])
        scaled = b.new_zeros(state.out_features, rows, dtype=torch.float64)
        scaled[:, :kept] = left @ (u[:, :kept] * s)
        factors = padded(Factors(vh @ basis.T, scaled, old.scale), old.rank)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def trainable(self, state: State) -> frozenset[str]:
        """Return B only."""
        return frozenset({"B"})
