"""What evaluations measure beside the held-out loss and the task's own scores."""

from dataclasses import dataclass

from flower_split.config.validation import at_least, one_of

TEXT_SCORES = ("rouge", "bleu", "exact-match")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What evaluations measure beside the held-out loss and the task's own scores."""

    text_scores: str = ""
    """Scores of what the model makes of held-out prompts, as "name, name": rouge, bleu, exact-match
    (extra text-scores), where the task has prompts; empty: nothing is generated."""
    max_new_tokens: int = 64
    """Tokens that the model makes of a prompt for text-scores, at most; the likeliest each time."""
    max_prompts: int = 32
    """Held-out records of one client whose prompts are continued in one evaluation, the first ones; 0:
    all."""

    personalised: bool = False
    """Also evaluate each client's own model: its adapter as its last local training left it, before it was
    averaged, with the trunk as it is now. It stays on the client's disk (train.client-dir)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names in ``text_scores``."""
        return tuple(filter(None, (name.strip() for name in self.text_scores.split(","))))

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name in self.names:
            one_of("evaluation.text-scores", name, TEXT_SCORES)
        at_least("evaluation.max-new-tokens", self.max_new_tokens, 1)
        at_least("evaluation.max-prompts", self.max_prompts, 0)
