"""FedEx-LoRA: average A and B, and put what that misses into the base.

FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models.
Raghav Singhal, Kaustubh Ponkshe, Praneeth Vepakomma. ACL 2025, arXiv 2410.09432.

The residual is Σ w s B A − s B̄Ā = s Σ w (B − B̄)(A − Ā), [out, in], low-rank as it stands: it is
never formed, and it has the orientation of ΔW (out × in), as a linear layer's weight does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import mean_a, mean_b


@dataclass(frozen=True, kw_only=True, slots=True)
class FedExLoRA(Aggregator):
    """FedIT with an exact residual for the base."""

    name: ClassVar[str] = "fedex-lora"
    paper: ClassVar[str] = "2410.09432"
    exactness: ClassVar[str] = "exact"
    deviation: ClassVar[str] = (
        "the residual is carried beside the base weights in fp32, not merged into them"
    )
    changes_base: ClassVar[bool] = True

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = state.factors.scale
        a, b = mean_a(clients), mean_b(clients, scale)
        residual = LowRankSum(state.out_features, state.in_features, device=a.device)
        for client in clients:
            own_b = client.returned.B.to(b.device, torch.float64) * (client.returned.scale / scale)
            own_a = client.returned.A.to(a.device, torch.float64)
            residual.add_product(own_b - b, own_a - a, scale * client.share)
        left, right = residual.product()
        mean = Factors(a, b, scale)
        return AggregationResult(
            replace(state, factors=mean, server_round=state.server_round + 1),
            residual=Factors(right, left, 1.0),
        )
