"""FedIT: average A and B separately.

Towards Building the Federated GPT: Federated Instruction Tuning. Jianyi Zhang, Saeed Vahidian,
Martin Kuo, Chunyuan Li, Ruiyi Zhang, Tong Yu, Yufan Zhou, Guoyin Wang, Yiran Chen.
ICASSP 2024, arXiv 2305.05644.

The mean of the factors is not the factors of the mean: Σw B · Σw A ≠ Σw BA unless all A or all B
are equal. It is the baseline that the other methods improve on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import check_updates, common_rank, common_scale
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import mean_a, mean_b


@dataclass(frozen=True, kw_only=True, slots=True)
class FedIT(Aggregator):
    """A ← Σ w A, B ← Σ w B; all clients have one rank and one scale."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "2305.05644"
    exactness: ClassVar[str] = "none: means of factors"
    mixed_scales: ClassVar[bool] = False

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = common_scale(self.name, clients)
        mean = Factors(mean_a(clients).float(), mean_b(clients, scale).float(), scale)
        return AggregationResult(replace(state, factors=mean, server_round=state.server_round + 1))
