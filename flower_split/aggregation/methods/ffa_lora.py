"""FFA-LoRA: freeze A for ever, average B.

Improving LoRA in Privacy-preserving Federated Learning. Youbang Sun, Zitao Li, Yaliang Li,
Bolin Ding. ICLR 2024, arXiv 2403.12313.

With one A for all, ΔW is linear in B, so the mean of B is exact and a server step on B is a step on
ΔW. Only B travels up, and noise added to it for privacy is not multiplied with noise in A.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import mean_b, note_frozen, step_towards


@dataclass(frozen=True, kw_only=True, slots=True)
class FFALoRA(Aggregator):
    """B ← Σ w B; A is the server's own, whatever clients return for it."""

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "2403.12313"
    exactness: ClassVar[str] = "exact"
    takes_learning_rate: ClassVar[bool] = True

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        note_frozen(self.name, clients, "A")
        old = state.factors
        b = step_towards(old.B, mean_b(clients, old.scale), self.learning_rate)
        factors = Factors(old.A, b, old.scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def trainable(self, state: State) -> frozenset[str]:
        """Return B only."""
        return frozenset({"B"})
