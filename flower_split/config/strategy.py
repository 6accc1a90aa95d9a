"""How the clients' adapters become the next global adapter."""

from dataclasses import dataclass

from flower_split.config.validation import above, at_least, one_of

STRATEGIES = (
    "lora-fedavg",
    "fedavg",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "fedprox",
    "fedbuff",
)
ON_INVALID = ("refuse", "exclude")
STALENESS = ("polynomial", "constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """How the clients' adapters become the next global adapter.

    What a method, its options and the rules can do together is checked before the run begins, by
    ``flower_split.aggregation.from_config``, which knows them.
    """

    name: str = "lora-fedavg"
    """The strategy: lora-fedavg or fedbuff (with an aggregator of this package), or a strategy of
    Flower's."""
    aggregator: str = "product-delta"
    """The aggregation method: a name of flower_split.aggregation, a plug-in's name, or an import
    path."""
    options: str = ""
    """Options of the method or of Flower's strategy, as "name=value, ...", such as florist's
    tau=0.9."""
    max_rank: int = 0
    """Rank that the server keeps ΔW at; 0: four times the adapter's largest."""
    weighting: str = "tokens"
    """What a client is weighed by: tokens (its label tokens), examples, or uniform."""
    rules: str = ""
    """Rules applied before the method, in order, as "name, name=value, ...", such as norm-
    clipping=1.0."""
    on_invalid: str = "refuse"
    """On a malformed update: refuse the round, or exclude the client."""
    outlier_factor: float = 20.0
    """How many times the median client's an adapter's change may be, among three clients or more, before
    it is malformed, after the rules; 0: any."""
    server_learning_rate: float = 1.0
    """Learning rate of the server's step on the aggregated ΔW."""
    server_optimizer: str = "none"
    """Optimizer of the server's step on ΔW: none, momentum, adam, yogi or adagrad."""
    server_beta1: float = 0.9
    """Decay of its first moment."""
    server_beta2: float = 0.99
    """Decay of its second moment."""
    server_epsilon: float = 1e-3
    """Smallest root of its second moment."""
    device: str = "cpu"
    """Where ΔW is aggregated: cpu, auto, cuda, cuda:1, ..."""
    num_threads: int = 1
    """Modules aggregated at a time; the result does not depend on it."""
    dora: str = "exact"
    """How DoRA's magnitudes are aggregated: exact (clients send their norms), or mean."""
    buffer_size: int = 2
    """For fedbuff: arrivals that make a server round."""
    concurrency: int = 0
    """For fedbuff: clients that train at a time; 0: all."""
    max_staleness: int = 10
    """For fedbuff: optimizer steps that an arrival may be behind; 0: nobody overtakes anybody."""
    staleness: str = "polynomial"
    """For fedbuff: an arrival's factor by its staleness: polynomial, or constant (1)."""
    staleness_exponent: float = 0.5
    """For fedbuff: exponent of polynomial, (1 + staleness) ** -exponent."""

    @property
    def aggregates_lora(self) -> bool:
        """Whether the strategy is this package's, with ``aggregator`` and all that belongs to it."""
        return self.name in ("lora-fedavg", "fedbuff")

    def __post_init__(self) -> None:
        """Check choices and ranges; the aggregator's name is checked where they are made."""
        one_of("strategy.name", self.name, STRATEGIES)
        one_of("strategy.weighting", self.weighting, ("tokens", "examples", "uniform"))
        one_of("strategy.on-invalid", self.on_invalid, ON_INVALID)
        one_of("strategy.dora", self.dora, ("exact", "mean"))
        at_least("strategy.max-rank", self.max_rank, 0)
        at_least("strategy.outlier-factor", self.outlier_factor, 0)
        at_least("strategy.num-threads", self.num_threads, 1)
        above("strategy.server-learning-rate", self.server_learning_rate, 0)
        at_least("strategy.buffer-size", self.buffer_size, 1)
        at_least("strategy.concurrency", self.concurrency, 0)
        at_least("strategy.max-staleness", self.max_staleness, 0)
        one_of("strategy.staleness", self.staleness, STALENESS)
        at_least("strategy.staleness-exponent", self.staleness_exponent, 0)
