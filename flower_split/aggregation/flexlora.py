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

from flower_split.aggregation.base import Aggregator, checked_rank_scale, leading
from flower_split.aggregation.checks import check_factors, check_updates
from flower_split.aggregation.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.lowrank import LowRankSum, Spectrum, factors_of, row_length
from flower_split.aggregation.product_delta import ordered_init


@dataclass(frozen=True, kw_only=True, slots=True)
class FlexLoRA(Aggregator):
    """ΔW ← Σ w s B A, kept as its leading ``max_rank`` components.

    Args:
        working_rank: Components kept while a round's sum is streamed; None: all, lossless.
    """

    name: ClassVar[str] = "flexlora"
    takes_learning_rate: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    working_rank: int | None = None

    def init(self, factors: Factors) -> State:
        """The initial state; see :class:`Aggregator`."""
        check_factors(factors, f"{self.name}: init got factors")
        return ordered_init(factors, self.max_rank)

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        total = LowRankSum(
            state.out_features,
            state.in_features,
            working_rank=self.working_rank,
            device=state.basis.device,
        )
        for client in check_updates(state, updates):
            total.add(client.returned, self.learning_rate * client.share)
        if self.learning_rate != 1:
            total.add(state.factors, 1 - self.learning_rate)
        spectrum = self.kept(total.spectrum(self.max_rank))
        return AggregationResult(
            replace(
                state,
                factors=factors_of(spectrum, row_length(state.basis)),
                server_round=state.server_round + 1,
            )
        )

    def kept(self, spectrum: Spectrum) -> Spectrum:
        """The components of the mean that become the global ΔW: all of them."""
        return spectrum

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """The leading components; see :class:`Aggregator`."""
        rank, scale = checked_rank_scale(state, rank, scale)
        return leading(state, rank, scale, self.seed)
