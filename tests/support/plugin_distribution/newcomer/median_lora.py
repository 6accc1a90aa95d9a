"""Median-LoRA: the entry-wise median of A and of B. An example, from no paper."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation import AggregationResult, Aggregator, Factors, State, Update
from flower_split.aggregation.core.checks import check_updates, common_rank, common_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class MedianLoRA(Aggregator):
    """A ← median of A, B ← median of B; all clients have one rank and one scale."""

    name: ClassVar[str] = "median-lora"
    exactness: ClassVar[str] = "none: medians of factors"
    mixed_scales: ClassVar[bool] = False
    counts_weights: ClassVar[bool] = False

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Take medians; of an even number of clients, the lower of the two in the middle."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = common_scale(self.name, clients)
        a = torch.stack([client.returned.A for client in clients]).median(dim=0).values
        b = torch.stack([client.returned.B for client in clients]).median(dim=0).values
        factors = Factors(a, b, scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )
