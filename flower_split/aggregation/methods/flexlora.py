"""FlexLoRA: average ΔW itself, give each client its best approximation at the client's rank.

Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources.
Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao, Yaliang Li. NeurIPS 2024, arXiv 2402.11505.

ΔW = Σ w s B A; a client of rank r_i gets the leading r_i components of its SVD, which by Eckart and
Young is the nearest matrix of that rank. A client of small rank returns a ΔW without the components
it never got, so under mixed ranks those shrink from round to round even if nobody trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import check_updates
from flower_split.aggregation.core.factors import AggregationResult, State, Update
from flower_split.aggregation.methods.product_family import ProductAggregator


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexLoRA(ProductAggregator):
    """ΔW ← Σ w s B A, kept as its leading ``max_rank`` components."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "2402.11505"
    exactness: ClassVar[str] = "nearest matrix of the client's rank"

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        total = self.new_sum(state)
        for client in check_updates(state, updates):
            total.add(client.returned, client.share)
        state = replace(state, server_round=state.server_round + 1)
        if self.learning_rate == 1 and self.server_optimizer == "none":
            return AggregationResult(self.at(state, total))
        total.add(state.factors, -1.0)
        return AggregationResult(self.moved(state, total))
