"""The whole run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flower_split.config.averaging import averages_factors, why_rate_as_it_is
from flower_split.config.clipping import clips_over_model
from flower_split.config.combinations import check_combinations
from flower_split.config.data import DataConfig
from flower_split.config.early_stopping import EarlyStoppingConfig
from flower_split.config.evaluation import EvaluationConfig
from flower_split.config.lora import LoraConfigs
from flower_split.config.model import ModelConfig
from flower_split.config.privacy import PrivacyConfig
from flower_split.config.strategy import StrategyConfig
from flower_split.config.train import TrainConfig
from flower_split.config.trunk import TrunkConfig
from flower_split.config.validation import (
    Scalar,
    above,
    at_least,
    one_of,
    plug_in_name,
    share,
)

MODES = ("joint", "frozen", "forward-only")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run needs; equal configs and seeds give equal runs."""

    seed: int = 0
    """Seed of everything random: initial values, data order, sampling and noise."""
    mode: str = "joint"
    """What trains: joint (all three parts), frozen (not the trunk), or forward-only (the top, as no
    gradient crosses the network)."""
    num_server_rounds: int = 3
    """Rounds of the run."""
    num_clients: int = 4
    """SuperNodes that must be connected before round 1."""
    fraction_train: float = 1.0
    """Share of the clients that train in a round, in (0, 1]; sampled with the seed."""
    fraction_evaluate: float = 1.0
    """Share of the clients that evaluate after a round, in [0, 1]; 0: none."""
    evaluate_every: int = 1
    """Rounds from one evaluation to the next; the last round is always evaluated."""
    join_timeout: float = 180.0
    """Seconds to wait for num-clients SuperNodes."""
    round_timeout: float = 1800.0
    """Seconds for one training or evaluation phase."""
    run_dir: str = ""
    """Directory for the run's artifacts; empty: runs/<time>-<id> where flwr runs."""
    round_retries: int = 2
    """How often a round is tried again after a process was lost."""
    resume: str = ""
    """Run directory to continue after its last committed round; empty: a new run."""
    resume_previous: bool = False
    """With resume: continue from the committed round before the last."""
    local_only_baseline: bool = False
    """Also train every client alone, for comparison."""
    report: str = "html"
    """What flower-split run writes of a finished run beside report.md, as "name, name": html (where
    the extra report is installed), a plug-in's name, or an import path; empty: nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base model."""
    lora: LoraConfigs = field(default_factory=LoraConfigs)
    """What trains of each part."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The clients' training."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """The trunk server."""
    data: DataConfig = field(default_factory=DataConfig)
    """The clients' data."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """The aggregation."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Differential privacy."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What evaluations measure beside the loss."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    """When the run ends before its last round."""
    app: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    """Keys under ``app.``, without it: the app's own, which nothing here reads or checks."""

    @property
    def reports(self) -> tuple[str, ...]:
        """Return the names in ``report``."""
        return tuple(filter(None, (name.strip() for name in self.report.split(","))))

    @property
    def clips_over_model(self) -> bool:
        """Whether max-grad-norm is that of bottom, trunk and top together."""
        return clips_over_model(self)

    @property
    def shares_gradients(self) -> bool:
        """Whether all clients take every optimizer step with the mean of their gradients."""
        return self.train.sync == "gradients"

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a client's optimizer goes on from round to round."""
        state = self.train.optimizer_state
        return (
            self.shares_gradients or state == "keep" or (state == "auto" and averages_factors(self))
        )

    @property
    def scales_client_rate(self) -> bool:
        """Whether the clients' learning rate is multiplied by the square root of their number."""
        if self.train.rate_scale == "auto":
            kept_averages = self.keeps_optimizer and averages_factors(self)
            return kept_averages and why_rate_as_it_is(self) == ""
        return self.train.rate_scale == "sqrt-clients"

    def __post_init__(self) -> None:
        """Check choices and ranges, and that the settings can go together."""
        one_of("mode", self.mode, MODES)
        at_least("num-server-rounds", self.num_server_rounds, 1)
        at_least("num-clients", self.num_clients, 1)
        at_least("round-retries", self.round_retries, 0)
        share("fraction-train", self.fraction_train)
        share("fraction-evaluate", self.fraction_evaluate, zero=True)
        at_least("evaluate-every", self.evaluate_every, 1)
        above("join-timeout", self.join_timeout, 0)
        above("round-timeout", self.round_timeout, 0)
        for name in self.reports:
            plug_in_name("report", name)
        check_combinations(self)
