"""What the methods share that keep the global ΔW itself, largest component first."""

from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.checks import check_factors
from flower_split.aggregation.core.factors import Factors, State
from flower_split.aggregation.core.lowrank import LowRankSum, Spectrum, factors_of, row_length
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.core.server_optimizer import ServerOptimizer
from flower_split.errors import AggregationError


def ordered_init(factors: Factors, max_rank: int | None) -> State:
    """Return the initial state with the global factors largest component first.

    Args:
        factors: The initial factors, already checked.
        max_rank: Components kept; None: all.
    """
    basis = factors.A.clone()
    total = LowRankSum(factors.out_features, factors.in_features, device=basis.device)
    total.add(factors, 1.0)
    ordered = factors_of(total.spectrum(max_rank), row_length(basis))
    return State(factors=ordered, basis=basis, scale=float(factors.scale))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductAggregator(Aggregator):
    """Base of the methods that average ΔW, at mixed ranks and scales.

    Args:
        max_rank: The rank the server recompresses ΔW to; None: no truncation.
        working_rank: Components kept while a round's sum is streamed; None: all, lossless.
        server_optimizer: ``none``, ``momentum``, ``adam``, ``yogi`` or ``adagrad``, on ΔW.
        beta1: Decay of its momentum.
        beta2: Decay of its second moment.
        epsilon: τ of the adaptive ones, in units of ΔW's entries.
    """

    takes_learning_rate: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True
    recompresses: ClassVar[bool] = True

    working_rank: int | None = None
    server_optimizer: str = "none"
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        Aggregator.__post_init__(self)
        self.optimizer()
        if self.working_rank is not None and self.working_rank < (self.max_rank or 1):
            raise AggregationError(
                f"working_rank must be at least max_rank ({self.max_rank}); it is "
                f"{self.working_rank!r}."
            )

    def optimizer(self) -> ServerOptimizer:
        """Return the server optimizer that the options describe."""
        return ServerOptimizer(
            name=self.server_optimizer, beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon
        )

    def init(self, factors: Factors) -> State:
        """Return the initial state; see :class:`Aggregator`."""
        check_factors(factors, f"{self.name}: init got factors")
        return ordered_init(factors, self.max_rank)

    def kept(self, spectrum: Spectrum) -> Spectrum:
        """Return which components become the global ΔW: all of those given."""
        return spectrum

    def new_sum(self, state: State) -> LowRankSum:
        """Return an empty sum of the module's shape."""
        return LowRankSum(
            state.out_features,
            state.in_features,
            working_rank=self.working_rank,
            device=state.basis.device,
        )

    def at(self, state: State, total: LowRankSum) -> State:
        """Return the state with ``total`` as its ΔW."""
        spectrum = self.kept(total.spectrum(self.max_rank))
        return replace(state, factors=factors_of(spectrum, row_length(state.basis)))

    def moved(self, state: State, change: LowRankSum) -> State:
        """Return the state after the server's step along the mean change of ΔW."""
        left, right, moments = self.optimizer().step(change, state.extra, self.max_rank)
        total = self.new_sum(state)
        total.add_product(left, right, self.learning_rate)
        total.add(state.factors, 1.0)
        return replace(self.at(state, total), extra=moments)
