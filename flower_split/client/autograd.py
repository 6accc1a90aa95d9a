"""Where autograd crosses to the trunk: the function that makes the calls, and copies around it.

The function lives on the CPU, with the copies to and from a GPU around it: then autograd runs it on
the thread that called ``backward``, not on the device's one backward thread, and micro-batches in
flight do not wait for each other's calls.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flower_split.client.calls import Exchange
from flower_split.wire.staging import to_device, to_host


def call_trunk(smashed: Tensor, always: Tensor, exchange: Exchange) -> Tensor:
    """Return ``trunk_output`` of ``smashed``, whose backward calls the trunk again.

    Args:
        smashed: [batch, seq, hidden], on any device, in the dtype that travels.
        always: Requires grad, so that the backward is called even where ``smashed`` does not.
        exchange: The micro-batch's two calls.
    """
    output: Tensor = _CallTrunk.apply(to_cpu(smashed), always, exchange)  # type: ignore[no-untyped-call]
    return from_cpu(output, smashed.device)


def to_cpu(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the CPU; its gradient goes back to where it was."""
    if tensor.device.type == "cpu":
        return tensor
    copy: Tensor = _ToHost.apply(tensor)  # type: ignore[no-untyped-call]
    return copy


def from_cpu(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; its gradient goes to the CPU."""
    if device.type == "cpu":
        return tensor
    copy: Tensor = _ToDevice.apply(tensor, device)  # type: ignore[no-untyped-call]
    return copy


class _ToHost(torch.autograd.Function):
    """Smashed data to the CPU; its gradient to the device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.device = tensor.device
        return to_host(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return to_device(gradient, ctx.device)


class _ToDevice(torch.autograd.Function):
    """trunk_output to the device; its gradient to the CPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        return to_device(tensor, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return to_host(gradient), None


class _CallTrunk(torch.autograd.Function):
    """CPU tensors to the trunk and back, in both directions."""

    @staticmethod
    def forward(ctx: Any, smashed: Tensor, always: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(smashed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, trunk_output_grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.backward(trunk_output_grad), None, None
