"""HetLoRA: pad factors of different ranks with zeros, weight clients by the size of their ΔW.

Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. Yae Jee Cho, Luyang
Liu, Zheng Xu, Aldi Fahrezi, Gauri Joshi. EMNLP 2024, arXiv 2401.06432.

Rank self-pruning: where a client's training made ‖B[:, γr:]‖ ‖A[γr:]‖ smaller than it was received,
only the first γr components of what it returned are used. Client i's share is then
‖ΔW_i‖_F / Σ ‖ΔW_j‖_F: the sample counts that come as weights play no part (but are still checked).
Clients get the leading rows of A and columns of B. Rows that no client of a round has keep the
server's values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share, check_updates
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import inner_product
from flower_split.aggregation.core.method import Aggregator
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class HetLoRA(Aggregator):
    """A ← Σ v pad(A), B ← Σ v pad(B), v by ‖ΔW‖_F.

    Args:
        gamma: γ, the share of its rank that a client keeps when it prunes itself; 1: it never does.
    """

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "2401.06432"
    exactness: ClassVar[str] = "none: means of factors, weighted by ‖ΔW‖"
    deviation: ClassVar[str] = (
        "clients train without the paper's λ‖B tail‖‖A tail‖ in their loss, and a client that "
        "pruned itself has its full rank again in the next round"
    )
    mixed_ranks: ClassVar[bool] = True
    counts_weights: ClassVar[bool] = False

    gamma: float = 0.99

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        Aggregator.__post_init__(self)
        if not 0 < self.gamma <= 1:
            raise AggregationError(f"hetlora's gamma must be in (0, 1]; it is {self.gamma!r}.")

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        old = state.factors
        present = max(client.returned.rank for client in clients)
        used = [_self_pruned(client, self.gamma) for client in clients]
        a: Tensor = torch.zeros(present, state.in_features, dtype=torch.float64)
        b: Tensor = torch.zeros(state.out_features, present, dtype=torch.float64)
        a, b = a.to(old.A.device), b.to(old.B.device)
        for own, share in zip(used, _sparsity_shares(used), strict=True):
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


def _self_pruned(client: Share, gamma: float) -> Factors:
    """Return what a client returned, without the tail of its rank if training made that smaller."""
    own = client.returned
    keep = max(1, int(gamma * own.rank))
    if keep == own.rank or not _tail_size(own, keep) < _tail_size(client.received, keep):
        return own
    return Factors(own.A[:keep], own.B[:, :keep], own.scale)


def _tail_size(factors: Factors, keep: int) -> float:
    """Return ‖B[:, keep:]‖ ‖A[keep:]‖, Frobenius."""
    return float(factors.B[:, keep:].double().norm() * factors.A[keep:].double().norm())


def _sparsity_shares(used: Sequence[Factors]) -> list[float]:
    """Return each client's ‖ΔW‖_F over the sum of all."""
    norms = [max(inner_product(one, one), 0.0) ** 0.5 for one in used]
    total = sum(norms)
    if total == 0:  # nobody has moved from B = 0 yet
        return [1 / len(used)] * len(used)
    return [norm / total for norm in norms]
