"""RoLoRA: train and average B in one round, A in the next.

Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA. Shuangyi Chen, Yuanxin
Guo, Yue Ju, Harik Dalal, Zhongwen Zhu, Ashish Khisti. NeurIPS 2025, arXiv 2502.01755.

Within a round one factor is the same for everybody, so the mean of the other is exact; over two
rounds both learn. B goes first, because A has no gradient while B is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flower_split.aggregation.core.checks import Share, check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import mean_a, mean_b, note_frozen, step_towards


def _untouched(clients: Sequence[Share], part: str) -> bool:
    return all(
        torch.equal(getattr(client.received, part), getattr(client.returned, part))
        for client in clients
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoLoRA(Aggregator):
    """B ← Σ w B in even rounds (from 0), A ← Σ w A in odd ones."""

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "2502.01755"
    exactness: ClassVar[str] = "exact"
    takes_learning_rate: ClassVar[bool] = True

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`.

        Clients that kept to another order than this state's are taken at their word: if all of
        them left one factor as they got it, the other is what this round trained.
        """
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        (part,) = self.trainable(state)
        frozen = "A" if part == "B" else "B"
        if not _untouched(clients, frozen) and _untouched(clients, part):
            part, frozen = frozen, part
        note_frozen(self.name, clients, frozen)
        old = state.factors
        if part == "B":
            b = step_towards(old.B, mean_b(clients, old.scale), self.learning_rate)
            factors = Factors(old.A, b, old.scale)
        else:
            a = step_towards(old.A, mean_a(clients), self.learning_rate)
            factors = Factors(a, old.B, old.scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def trainable(self, state: State) -> frozenset[str]:
        """Return B in even rounds (from 0), A in odd ones."""
        return frozenset({"B"} if state.server_round % 2 == 0 else {"A"})
