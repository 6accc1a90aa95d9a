"""The end of an optimizer step that clients and trunk make together.

The trunk computes one clipping factor of the norm over bottom, trunk and top, as an unsplit model's
optimizer sees it, and where clients share their gradients, the one gradient that all of them step
with. See :mod:`flower_split.trunk.compute.clipping` for the formulas.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flower_split.training.grad_norm import grad_norm_squared


class StepEndRule(Protocol):
    """How the steps of a round end together, as the trunk said when the session opened."""

    @property
    def max_grad_norm(self) -> float:
        """L2 norm over the whole model; 0: each part clips by itself."""

    @property
    def share_gradients(self) -> bool:
        """Whether all clients step with the mean of their gradients."""


class StepEndReply(Protocol):
    """The trunk's answer, when it has stepped."""

    @property
    def clip_factor(self) -> float:
        """What every gradient of the step is multiplied by."""

    @property
    def grad_norm(self) -> float:
        """L2 norm over the whole model before clipping; 0 where each part clips by itself."""

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The clients' mean gradients, not clipped; empty where they are not shared."""


class StepEndingTrunk(Protocol):
    """A remote trunk that may end steps together with its clients."""

    @property
    def finish(self) -> StepEndRule | None:
        """How the steps of the open round end; None: each party ends its own."""

    def finish_step(
        self,
        window: int,
        num_micro_batches: int,
        grad_norm_squared: float,
        gradients: Mapping[str, Tensor],
    ) -> StepEndReply:
        """Wait until the trunk has stepped; called after the last backward of every window."""


def end_step_together(
    trunk: StepEndingTrunk,
    rule: StepEndRule,
    window: int,
    num_micro_batches: int,
    named: Sequence[tuple[str, nn.Parameter]],
) -> float:
    """Make every ``.grad`` the one to step with: shared and clipped as the round says.

    Args:
        trunk: The remote trunk, with an open session.
        rule: Its ``finish``.
        window: The optimizer step within the round, from 0.
        num_micro_batches: How many the step had.
        named: The parameters that train, by name; ``.grad`` is that of the mean loss of the
            step's tokens.

    Returns:
        The L2 norm over the whole model before clipping; 0 where each part clips by itself.

    Raises:
        TrunkError: The trunk refused, aborted the round, or did not answer in time.
    """
    shared: dict[str, Tensor] = {}
    if rule.share_gradients:
        # A parameter that no token reached here may have been reached elsewhere.
        shared = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in sorted(named, key=lambda item: item[0])
        }
    norm_squared = grad_norm_squared(parameter.grad for _, parameter in named)
    reply = trunk.finish_step(window, num_micro_batches, norm_squared, shared)
    for name, parameter in named:
        if shared:
            parameter.grad = reply.gradients[name].to(parameter.device, parameter.dtype)
        if parameter.grad is not None and reply.clip_factor < 1.0:
            parameter.grad.mul_(reply.clip_factor)
    return reply.grad_norm
