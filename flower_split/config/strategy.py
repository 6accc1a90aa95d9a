"""How the clients' adapters become the next global adapter."""

from dataclasses import dataclass

from flower_split.config.rules import above, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """How the clients' adapters become the next global adapter."""

    aggregator: str = "product-delta"  # a name of flower_split.aggregation
    weighting: str = "tokens"  # a client's weight: label tokens, examples, or uniform
    server_learning_rate: float = 1.0  # on the aggregated delta

    def __post_init__(self) -> None:
        """Check choices and ranges; the aggregator's name is checked where they are made."""
        one_of("strategy.weighting", self.weighting, ("tokens", "examples", "uniform"))
        above("strategy.server-learning-rate", self.server_learning_rate, 0)
