"""Clipping of the trunk's gradient by one norm over the whole model, and the clients' part of it.

With ``gᵢ`` the gradient of client i's own parameters for the mean loss of its ``nᵢ`` tokens, the
clients' part of the squared norm is ``‖Σ nᵢ gᵢ / Σ nᵢ‖²`` where clients step with that one gradient,
and ``Σ nᵢ ‖gᵢ‖² / Σ nᵢ`` where each steps with its own. Both are ``‖g‖²`` with one client: then the
norm is that of the unsplit model.

A norm shrinks everybody's step, so no client's may be without bound. One that no gradient has, or
that is far above what the others' are beside their gradients of the trunk, is a fault of its client
(:func:`norm_faults`); and none counts for more than ``OUTLIER²`` times the median of the window's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flower_split.training.grad_norm import clip_factor, grad_norm_squared
from flower_split.trunk.compute.gradients import MAX_ENTRY

# How many times the median a client's norm may be. Clients of one model are within a few times of
# each other, whatever their data.
OUTLIER = 100.0


@dataclass(frozen=True, slots=True)
class Beside:
    """What is clipped together with the trunk's gradient."""

    max_grad_norm: float  # L2, over all of the model; 0: the trunk clips by itself
    norm_squared: float  # of the clients' part


@dataclass(frozen=True, slots=True)
class Clipping:
    """How one step was clipped."""

    grad_norm: float = 0.0  # L2, over all of the model, before clipping
    factor: float = 1.0


def clip_together(parameters: Sequence[nn.Parameter], beside: Beside) -> Clipping:
    """Scale every ``.grad`` by the factor of the norm over ``parameters`` and ``beside``."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = math.sqrt(grad_norm_squared(gradients) + beside.norm_squared)
    factor = clip_factor(total, beside.max_grad_norm)
    if factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    return Clipping(total, factor)


def norm_faults(
    norms_squared: Mapping[int, float], trunk_norms: Mapping[int, float]
) -> dict[int, str]:
    """Return the slots whose norms may not enter a step, each with the reason.

    Every slot's norm is compared with that of its own gradient of the trunk, which the trunk has
    computed: a client whose data gives small or large gradients has both small or large. Fewer than
    three clients have no majority, and nobody is blamed by comparison.

    Args:
        norms_squared: Slot -> of the client's own parameters.
        trunk_norms: Slot -> L2 norm of its gradient of the trunk; slots that pass through only some
            of the trunk's layers are left out.
    """
    found: dict[int, str] = {}
    for slot, value in sorted(norms_squared.items()):
        if not 0 <= value <= MAX_ENTRY**2:  # NaN is not
            found[slot] = (
                f"its grad_norm_squared is {value:g}, and must be from 0 to {MAX_ENTRY**2:g}. Lower "
                "the learning rate, or look at the client's data"
            )
    ratios = {
        slot: norms_squared[slot] / trunk_norms[slot] ** 2
        for slot in sorted(trunk_norms)
        if trunk_norms[slot] > 0 and slot not in found
    }
    if len(ratios) < 3:
        return found
    most = OUTLIER**2 * lower_median(ratios)
    for slot, ratio in ratios.items():
        if ratio > most > 0:
            found[slot] = (
                f"its grad_norm_squared, {norms_squared[slot]:g}, is more than {OUTLIER**2:g} times "
                "what the other clients' are beside their gradients of the trunk. Look at the "
                "client's data and at its version of the app"
            )
    return found


def lower_median(values: Mapping[int, float]) -> float:
    """Return the middle value, or the smaller of the two: a minority cannot raise it."""
    return sorted(values.values())[(len(values) - 1) // 2]


def mean_norm_squared(norms_squared: Mapping[int, float], tokens: Mapping[int, float]) -> float:
    """Return ``Σ nᵢ cᵢ / Σ nᵢ``, in slot order, each ``cᵢ`` at most ``OUTLIER²`` times their median."""
    slots = sorted(norms_squared)
    total = sum(tokens[slot] for slot in slots)
    most = OUTLIER**2 * lower_median(norms_squared)
    return sum(tokens[slot] * min(norms_squared[slot], most) for slot in slots) / total


def mean_gradients(
    given: Mapping[int, Mapping[str, Tensor]], tokens: Mapping[int, float]
) -> dict[str, Tensor]:
    """Return ``Σ nᵢ gᵢ / Σ nᵢ`` for every name, in fp64.

    Args:
        given: Slot -> its gradients; all have the same names and shapes.
        tokens: Slot -> its label tokens.
    """
    slots = sorted(given)
    total = sum(tokens[slot] for slot in slots)
    mean: dict[str, Tensor] = {}
    for name in given[slots[0]]:
        summed = torch.zeros_like(given[slots[0]][name], dtype=torch.float64)
        for slot in slots:
            summed.add_(given[slot][name].double(), alpha=tokens[slot])
        mean[name] = summed / total
    return mean
