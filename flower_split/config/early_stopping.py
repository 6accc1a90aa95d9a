"""When a run ends before its last round."""

from dataclasses import dataclass

from flower_split.config.validation import at_least, one_of
from flower_split.errors import ConfigError

LOSSES = ("eval-loss", "train-loss")
SCORES = (
    "accuracy",
    "f1",
    "exact-match",
    "text-exact-match",
    "rouge1",
    "rouge2",
    "rouge-l",
    "bleu",
)
"""Of held-out data, where the task or ``evaluation.text-scores`` has them; larger is better."""
CENTRAL = "central."
"""Begins the names of what the app's own ``evaluate_fn`` measures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingConfig:
    """When a run ends before its last round, by a metric that no longer improves."""

    metric: str = ""
    """What to look at after a round: eval-loss (held-out, over all clients that evaluated), train-loss,
    a held-out score that the run has (accuracy, f1, exact-match, text-exact-match, rouge1, rouge2,
    rouge-l, bleu; with goal = max), or central.NAME (NAME of what the app's evaluate_fn returns); empty:
    the run goes to its end."""
    goal: str = "min"
    """Whether smaller (min) or larger (max) is better."""
    patience: int = 3
    """Measurements in a row without an improvement after which the run ends."""
    min_delta: float = 0.0
    """What the metric must improve on its best by, at least, to count."""

    @property
    def central_name(self) -> str:
        """Return the name of evaluate_fn's metric; empty: it looks at another one."""
        return self.metric.removeprefix(CENTRAL) if self.metric.startswith(CENTRAL) else ""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        known = (*LOSSES, *SCORES)
        if self.metric and self.metric not in known and not self.central_name:
            raise ConfigError(
                f"early-stopping.metric must be one of {', '.join(known)}, or {CENTRAL}NAME with the "
                f"name of what the app's evaluate_fn returns; it is {self.metric!r}."
            )
        one_of("early-stopping.goal", self.goal, ("min", "max"))
        at_least("early-stopping.patience", self.patience, 1)
        at_least("early-stopping.min-delta", self.min_delta, 0)
