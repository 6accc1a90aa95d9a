"""The L2 norm of gradients, summed in fp64 so that parts add up to the norm of the whole."""

from collections.abc import Iterable

import torch
from torch import Tensor


def grad_norm_squared(gradients: Iterable[Tensor | None]) -> float:
    """Return the squared L2 norm over all ``gradients``; None counts as zeros. One wait on a GPU."""
    norms = [
        torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64)
        for gradient in gradients
        if gradient is not None
    ]
    if not norms:
        return 0.0
    gathered = torch.stack([norm.to(norms[0].device) for norm in norms])  # may lie on several
    return float(gathered.square().sum())


def clip_factor(total_norm: float, max_norm: float) -> float:
    """Return what gradients of ``total_norm`` are multiplied by, as ``clip_grad_norm_`` does it."""
    return min(1.0, max_norm / (total_norm + 1e-6))
