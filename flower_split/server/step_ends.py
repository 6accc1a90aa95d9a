"""How a run's optimizer steps end together: the rule that the trunk gets, the notes that a reader gets."""

from flower_split.config import RunConfig
from flower_split.config.clipping import why_per_part
from flower_split.protocol.values import FinishRule

GRADIENTS_ARE_SEEN = (
    'train.sync = "gradients": in every optimizer step each client sends the gradients of its own LoRA '
    "to the trunk, which therefore sees them, beside the activations."
)


def finish_rule(config: RunConfig) -> FinishRule | None:
    """Return how the steps of a run's rounds end together; None: each party ends its own."""
    if not (config.clips_over_model or config.shares_gradients):
        return None
    return FinishRule(
        max_grad_norm=config.train.optimizer.max_grad_norm if config.clips_over_model else 0.0,
        share_gradients=config.shares_gradients,
    )


def step_notes(config: RunConfig) -> list[str]:
    """Return what a reader must know about how the run's optimizer steps end."""
    notes = [GRADIENTS_ARE_SEEN] if config.shares_gradients else []
    why = why_per_part(config)
    clips = config.train.optimizer.max_grad_norm > 0
    if config.train.max_grad_norm_over == "auto" and clips and why:
        notes.append(
            f'train.max-grad-norm-over = "auto" clips each part by itself in this run: {why}.'
        )
    return notes
