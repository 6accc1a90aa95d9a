"""FedIT: average A and B separately.

Towards Building the Federated GPT: Federated Instruction Tuning. Jianyi Zhang, Saeed Vahidian,
Martin Kuo, Chunyuan Li, Ruiyi Zhang, Tong Yu, Yufan Zhou, Guoyin Wang, Yiran Chen.
ICASSP 2024, arXiv 2305.05644.

The mean of the factors is not the factors of the mean: Σw B · Σw A ≠ Σw BA unless all A or all B
are equal. It is the baseline that the other methods improve on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.base import Aggregator, only_own_rank
from flower_split.aggregation.checks import Share, check_updates, common_rank, common_scale
from flower_split.aggregation.factors import AggregationResult, Factors, State, Update


def mean_of(clients: Sequence[Share], pick: Callable[[Factors], Tensor]) -> Tensor:
    """The weighted mean of one tensor over clients, summed in their order in fp64.

    Args:
        clients: The round's clients.
        pick: Takes the tensor from what a client returned.
    """
    total = torch.zeros_like(pick(clients[0].returned), dtype=torch.float64)
    for client in clients:
        total += client.share * pick(client.returned).to(total.device, torch.float64)
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class FedIT(Aggregator):
    """A ← Σ w A, B ← Σ w B; all clients have one rank and one scale."""

    name: ClassVar[str] = "fedit"

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = common_scale(self.name, clients)
        mean = Factors(
            mean_of(clients, lambda factors: factors.A).float(),
            mean_of(clients, lambda factors: factors.B).float(),
            scale,
        )
        return AggregationResult(replace(state, factors=mean, server_round=state.server_round + 1))

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """The global factors; see :class:`Aggregator`."""
        return only_own_rank(self.name, state, rank, scale)
