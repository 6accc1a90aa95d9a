"""FLoRA: stack all clients' factors, merge the stack into the base, start LoRA afresh.

FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations. Ziyao
Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu, Ang Li. NeurIPS 2024,
arXiv 2409.05976.

[B_1 … B_K] · [w_1 s_1 A_1; …; w_K s_K A_K] is Σ w ΔW exactly, at any mix of ranks. The price is the
download, which grows with the number of clients, and that A and B start from nothing every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import check_factors, check_updates
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, row_length
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.product_family import ordered_init


@dataclass(frozen=True, kw_only=True, slots=True)
class FLoRA(Aggregator):
    """residual ← the stack; A ← new random rows, B ← 0."""

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "2409.05976"
    exactness: ClassVar[str] = "exact"
    deviation: ClassVar[str] = (
        "the stack is carried beside the base weights in fp32, not merged into them"
    )
    changes_base: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    def init(self, factors: Factors) -> State:
        """Return the initial state; see :class:`Aggregator`."""
        check_factors(factors, f"{self.name}: init got factors")
        return ordered_init(factors, self.max_rank)

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        stack = LowRankSum(state.out_features, state.in_features, device=state.basis.device)
        for client in clients:
            stack.add(client.returned, client.share)
        b, a = stack.product()
        fresh = self._restarted(state)
        return AggregationResult(fresh, residual=Factors(a, b, 1.0))

    def _restarted(self, state: State) -> State:
        """Return ΔW = 0 with new rows for A, drawn from the seed and the rows before them."""
        own = int(state.basis.view(torch.int32).sum(dtype=torch.int64))
        generator = torch.Generator().manual_seed((self.seed + own) % 2**63)
        rows = torch.randn(state.basis.shape, generator=generator)
        basis = rows.to(state.basis.device) * (row_length(state.basis) / state.in_features**0.5)
        zero = Factors(basis[:0].clone(), basis.new_zeros(state.out_features, 0), 1.0)
        return replace(state, factors=zero, basis=basis, server_round=state.server_round + 1)
