"""Differential privacy of the clients' adapters."""

from dataclasses import dataclass

from flower_split.config.validation import above, at_least, one_of
from flower_split.errors import ConfigError

MECHANISMS = (
    "none",
    "server-fixed",
    "server-adaptive",
    "client-fixed",
    "client-adaptive",
    "local",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """Clipping and noise on the clients' adapters; what goes to the trunk has neither.

    ``server-`` and ``client-`` say who clips; the server adds the noise to the aggregate (Flower's
    wrappers). With ``local`` every client adds it to its own update (Flower's ``LocalDpMod``).
    """

    mechanism: str = "none"
    """Who clips, and whether the norm adapts: none, server-fixed, server-adaptive, client-fixed,
    client-adaptive, or local."""
    clipping_norm: float = 1.0
    """L2 norm that one client's update is clipped to; adaptive: in the first round."""
    noise_multiplier: float = 1.0
    """For server- and client-: standard deviation of the noise on the sum, over clipping-norm."""
    target_quantile: float = 0.5
    """For adaptive: share of the updates that shall be clipped, between 0 and 1."""
    clipping_norm_learning_rate: float = 0.2
    """For adaptive: learning rate of the clipping norm."""
    clipped_count_stddev: float = 0.0
    """For adaptive: standard deviation of the noise on the count of clipped updates; 0: clients /
    20."""
    epsilon: float = 1.0
    """For local: epsilon of one update."""
    delta: float = 1e-5
    """For local: delta of one update; else the delta at which the privacy spent is reported."""
    sensitivity: float = 0.0
    """For local: largest L2 distance of two updates; 0: twice clipping-norm."""
    max_epsilon: float = 0.0
    """For server-fixed and client-fixed: a run that would spend more epsilon is refused; 0: no
    limit."""

    @property
    def central(self) -> bool:
        """Whether the server adds the noise, to the aggregate."""
        return self.mechanism.startswith(("server-", "client-"))

    @property
    def adaptive(self) -> bool:
        """Whether the clipping norm follows the updates."""
        return self.mechanism.endswith("-adaptive")

    @property
    def local_sensitivity(self) -> float:
        """Of one client's clipped update: two of them are at most twice the norm apart."""
        return self.sensitivity or 2 * self.clipping_norm

    def __post_init__(self) -> None:
        """Check choices and ranges, and that a limit can be kept."""
        one_of("privacy.mechanism", self.mechanism, MECHANISMS)
        above("privacy.clipping-norm", self.clipping_norm, 0)
        at_least("privacy.noise-multiplier", self.noise_multiplier, 0)
        above("privacy.clipping-norm-learning-rate", self.clipping_norm_learning_rate, 0)
        at_least("privacy.clipped-count-stddev", self.clipped_count_stddev, 0)
        above("privacy.epsilon", self.epsilon, 0)
        at_least("privacy.sensitivity", self.sensitivity, 0)
        at_least("privacy.max-epsilon", self.max_epsilon, 0)
        for key, value in (("delta", self.delta), ("target-quantile", self.target_quantile)):
            if not 0 < value < 1:
                raise ConfigError(f"privacy.{key} must be between 0 and 1; it is {value!r}.")
        if self.max_epsilon and self.mechanism not in ("server-fixed", "client-fixed"):
            raise ConfigError(
                "privacy.max-epsilon needs a mechanism whose privacy Flower can account for, "
                f'"server-fixed" or "client-fixed"; it is {self.mechanism!r}. Set max-epsilon = 0.'
            )
        if self.max_epsilon and self.noise_multiplier == 0:
            raise ConfigError(
                "privacy.max-epsilon needs noise, and privacy.noise-multiplier is 0: without noise "
                "epsilon is infinite. Raise the noise multiplier, or set max-epsilon = 0."
            )
