"""Copies between a GPU and the CPU within autograd, for calls that must be made with CPU tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flower_split.wire.staging import to_device, to_host


def to_cpu(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU; its gradient goes back to where it was."""
    if tensor.device.type == "cpu":
        return tensor
    copy: Tensor = _ToHost.apply(tensor)  # type: ignore[no-untyped-call]
    return copy


def from_cpu(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; its gradient goes to the CPU."""
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
