"""Over which parameters gradients are clipped: the whole model, or each part by itself."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # run.py checks itself against what is here
    from flower_split.config.run import RunConfig


def steps_with_every_local_step(config: "RunConfig") -> bool:
    """Return whether clients and trunk step at the same time."""
    return config.mode == "joint" and config.trunk.step_every == "local-step"


def same_max_grad_norm(config: "RunConfig") -> bool:
    """Return whether clients and trunk clip to the same norm."""
    return config.train.optimizer.max_grad_norm == config.trunk.optimizer.max_grad_norm


def is_guarded(config: "RunConfig") -> bool:
    """Return whether one client's word may not scale everybody's step."""
    return config.privacy.mechanism != "none" or config.trunk.reduction != "mean"


def clips_over_model(config: "RunConfig") -> bool:
    """Return whether ``max-grad-norm`` is that of bottom, trunk and top together."""
    if config.train.optimizer.max_grad_norm == 0 or config.train.max_grad_norm_over == "part":
        return False
    return why_per_part(config) == ""


def why_per_part(config: "RunConfig") -> str:
    """Say what keeps ``auto`` from clipping over the whole model; empty: nothing does."""
    if not steps_with_every_local_step(config):
        return "the trunk does not step with every local step"
    if not same_max_grad_norm(config):
        return "train.optimizer.max-grad-norm and trunk.optimizer.max-grad-norm differ"
    if is_guarded(config):
        return "under privacy.* or trunk.reduction, no client's norm may scale the others' steps"
    return ""
