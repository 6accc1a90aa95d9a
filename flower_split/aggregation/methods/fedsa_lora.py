"""FedSA-LoRA: share A, keep B with each client.

Selective Aggregation for Low-Rank Adaptation in Federated Learning. Pengxin Guo, Shuang Zeng,
Yanran Wang, Huijie Fan, Feifei Wang, Liangqiong Qu. ICLR 2025, arXiv 2410.01463.

A learns what is common, B what is a client's own: the model of client i is B_i A with the mean A.
There is no global ΔW. What ``delta`` returns is the mean A with the mean of the B that the server
was shown, which is the initial B when clients keep theirs; ``distribute`` never sends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.method import Aggregator, distribute_factors
from flower_split.aggregation.methods.means import mean_a, mean_b


@dataclass(frozen=True, kw_only=True, slots=True)
class FedSALoRA(Aggregator):
    """A ← Σ w A; every client trains both factors and keeps its B."""

    name: ClassVar[str] = "fedsa-lora"
    paper: ClassVar[str] = "2410.01463"
    exactness: ClassVar[str] = "no global ΔW: B is personal"
    private: ClassVar[frozenset[str]] = frozenset({"B"})

    def init(self, factors: Factors) -> State:
        """Return the initial state; see :class:`Aggregator`."""
        state = Aggregator.init(self, factors)
        return replace(state, extra={"B": state.factors.B})

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        scale = state.factors.scale
        factors = Factors(mean_a(clients).float(), mean_b(clients, scale).float(), scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """Return the mean A with the initial B, for a client that has no B of its own yet."""
        own = replace(state, factors=Factors(state.factors.A, state.extra["B"], state.scale))
        return distribute_factors(self, own, rank, scale)
