"""LoRA-FAIR: average A and B, then correct B towards the exact mean of ΔW.

LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement. Jieming Bian,
Lei Wang, Letian Zhang, Jie Xu. ICCV 2025, arXiv 2411.14961.

The paper looks for ΔB that makes (B̄ + ΔB)Ā most like Σ w BA, with a penalty on ΔB, by gradient
descent on a cosine similarity. Here likeness is the Frobenius distance, whose minimum is closed:
B = B̄ + (Σ w BA − B̄Ā) Āᵀ (ĀĀᵀ + λI)⁻¹. At λ = 0 that is the projection of the exact mean on the row
space of Ā, the best that any B can do. Only [r, r] and [out, r] matrices appear.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator, only_own_rank
from flower_split.aggregation.methods.means import mean_a, mean_b, mean_of
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAFair(Aggregator):
    """A ← Ā, B ← B̄ + ΔB.

    Args:
        penalty: λ in units of the mean squared row length of Ā; 0: the full correction.
    """

    name: ClassVar[str] = "lora-fair"

    penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        Aggregator.__post_init__(self)
        if not self.penalty >= 0:
            raise AggregationError(f"lora-fair's penalty must be at least 0; it is {self.penalty}.")

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = state.factors.scale
        a, b = mean_a(clients), mean_b(clients, scale)
        exact = mean_of(
            clients,
            lambda own: (
                own.B.double() @ (own.A.double() @ a.T.to(own.A.device)) * (own.scale / scale)
            ),
        )
        gram = a @ a.T
        values, vectors = torch.linalg.eigh(gram)
        # Directions that Ā does not have cannot be corrected: they keep the mean B.
        usable = values > values[-1:] * 1e-12
        damped = values + self.penalty * values.mean()
        inverse = torch.where(usable, 1 / damped, torch.zeros_like(values))
        correction = (exact - b @ gram) @ (vectors * inverse) @ vectors.T
        factors = Factors(a, b + correction, scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """The corrected mean; see :class:`Aggregator`."""
        return only_own_rank(self.name, state, rank, scale)
