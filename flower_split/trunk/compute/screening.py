"""Which client's gradient may not enter a step, and which state may not be kept.

A client's numbers scale other clients' work in three ways: the denominator of its loss, its label
tokens, and the gradient itself. Tokens are bounded by the rows x positions that the trunk saw, when a
backward arrives (:func:`~flower_split.trunk.compute.checks.check_weights`); the other two are looked at
before a window is reduced, so that the window can be reduced again without the slot.
"""

from collections.abc import Mapping

from flower_split.aggregation.core.outliers import above_median, median
from flower_split.trunk.compute.checks import largest_magnitude
from flower_split.trunk.compute.gradients import SlotGradient

# Of one entry of a client's token-mean gradient, and of one trained weight. No training that works
# comes near it, and an fp32 norm over a trillion of such entries is still finite.
MAX_ENTRY = 1e12
_ROUNDING = 1e-9  # relative, of a client's sum of label tokens


def fault(gradient: SlotGradient, *, whole_step: bool = True) -> str:
    """Return why a slot's gradient may not enter a step; empty: it may.

    Args:
        gradient: Of the slot, with all micro-batches of the window.
        whole_step: Whether the window holds whole optimizer steps of the client, so that a
            denominator above the window's label tokens weighs the slot by more than it has.
    """
    allowed = gradient.num_tokens * (1 + _ROUNDING)
    if whole_step and gradient.largest_denominator > allowed:
        return (
            f"its loss_denominator is {gradient.largest_denominator:g}, and may be at most the label "
            f"tokens that it declared in the window, {gradient.num_tokens:g}. Divide the summed loss "
            "by the label tokens of the micro-batch or of the optimizer step"
        )
    weight = gradient.denominator / gradient.num_tokens
    if not weight <= MAX_ENTRY:  # of a gradient of zeros as well: 0 times infinity is NaN
        return (
            f"its loss_denominator is {gradient.denominator:g} for {gradient.num_tokens:g} label tokens, "
            f"and may be at most {MAX_ENTRY:g} times as many"
        )
    largest = largest_magnitude([total for total in gradient.total if total is not None])
    mean = largest * weight
    if not mean <= MAX_ENTRY:  # NaN is not
        return (
            f"the largest entry of its gradient is {mean:g}, and may be at most {MAX_ENTRY:g}. Lower "
            "the learning rate, clip the gradients, or look at the client's data"
        )
    return ""


def faults(gradients: Mapping[int, SlotGradient], *, whole_step: bool = True) -> dict[int, str]:
    """Return the slots whose gradients may not enter a step, each with the reason."""
    found: dict[int, str] = {}
    for slot in sorted(gradients):
        why = fault(gradients[slot], whole_step=whole_step)
        if why:
            found[slot] = why
    return found


def outliers(gradients: Mapping[int, SlotGradient], factor: float) -> dict[int, str]:
    """Return the slots whose gradients are far above the window's median, each with the reason.

    Compared are the L2 norms of the token-mean gradients, in fp64. That of a slot with fewer label
    tokens than the median slot has more noise in it, and counts for less in the step: it is compared
    as it counts. Fewer than three slots have no majority, and nobody is blamed.

    Args:
        gradients: Of a window without :func:`faults`.
        factor: Of the median (``trunk.outlier-factor``); 0: there is no bound.
    """
    if factor == 0 or len(gradients) < 3:
        return {}
    pulls = pulls_of(gradients)
    return {
        slot: f"the norm of its gradient is {multiple:.4g} times the median of the window's "
        f"{len(gradients)} clients, and may be at most {factor:g} times (trunk.outlier-factor). "
        "Look at the client's data and its version of the app, or raise the key"
        for slot, multiple in above_median(pulls, factor).items()
    }


def pulls_of(gradients: Mapping[int, SlotGradient]) -> dict[int, float]:
    """Return the norms that :func:`outliers` compares, in slot order."""
    typical = median({slot: gradient.num_tokens for slot, gradient in gradients.items()})
    return {
        slot: gradients[slot].mean_norm() * min(1.0, gradients[slot].num_tokens / typical)
        for slot in sorted(gradients)
    }
