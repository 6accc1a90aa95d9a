"""Clipping of the trunk's gradient by one norm over the whole model, and the clients' part of it.

With ``gᵢ`` the gradient of client i's own parameters for the mean loss of its ``nᵢ`` tokens, the
clients' part of the squared norm is ``‖Σ nᵢ gᵢ / Σ nᵢ‖²`` where clients step with that one gradient,
and ``Σ nᵢ ‖gᵢ‖² / Σ nᵢ`` where each steps with its own. Both are ``‖g‖²`` with one client: then the
norm is that of the unsplit model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flower_split.training.grad_norm import clip_factor, grad_norm_squared


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


def mean_norm_squared(norms_squared: Mapping[int, float], tokens: Mapping[int, float]) -> float:
    """Return ``Σ nᵢ cᵢ / Σ nᵢ``, in slot order."""
    slots = sorted(norms_squared)
    total = sum(tokens[slot] for slot in slots)
    return sum(tokens[slot] * norms_squared[slot] for slot in slots) / total


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
