"""A GPU's tensors past autograd's node on the CPU: it sees stand-ins that have no memory of their own.

The node that calls the trunk stays on the CPU, for the reason that :mod:`flower_split.client.calls`
gives; where a trunk on the same GPU takes tensors as they lie, nothing needs to be copied there.

Shapes: smashed data, ``trunk_output`` and their gradients ``[batch, seq, hidden]``.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TwoCalls(Protocol):
    """The calls of one micro-batch."""

    def forward(self, smashed: Tensor) -> Tensor:
        """Send the smashed data; return ``trunk_output``."""

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        """Send the output's gradient; return ``smashed_grad``."""


class Passing:
    """The same calls with stand-ins on the CPU, around which the tensors on the GPU go.

    Args:
        calls: Take and return tensors on the GPU.
    """

    def __init__(self, calls: TwoCalls) -> None:
        self._calls = calls
        self._on_the_way: Tensor | None = None  # one at a time: each step waits for the one before

    def take_in(self, smashed: Tensor) -> Tensor:
        """Return the stand-in of ``smashed``, by which autograd goes on."""
        taken: Tensor = _TakeIn.apply(smashed, self)  # type: ignore[no-untyped-call]
        return taken

    def give_out(self, stand_in: Tensor) -> Tensor:
        """Return the tensor on the GPU that ``stand_in`` stands for."""
        given: Tensor = _GiveOut.apply(stand_in, self)  # type: ignore[no-untyped-call]
        return given

    def forward(self, smashed: Tensor) -> Tensor:
        """Make the forward; return the stand-in of ``trunk_output``."""
        return self.put(self._calls.forward(self.take()))

    def backward(self, trunk_output_grad: Tensor) -> Tensor:
        """Make the backward; return the stand-in of ``smashed_grad``."""
        return self.put(self._calls.backward(self.take()))

    def put(self, tensor: Tensor) -> Tensor:
        """Keep a tensor for the next :meth:`take`, and return its stand-in."""
        self._on_the_way = tensor
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

    def take(self) -> Tensor:
        """Return the tensor of the last :meth:`put`."""
        tensor, self._on_the_way = self._on_the_way, None
        assert tensor is not None, "autograd runs the nodes of one micro-batch in their order"
        return tensor


class _TakeIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smashed: Tensor, passing: Passing) -> Tensor:
        ctx.passing = passing
        return passing.put(smashed.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stand_in: Tensor) -> tuple[Tensor, None]:
        return ctx.passing.take(), None


class _GiveOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, passing: Passing) -> Tensor:
        ctx.passing = passing
        return passing.take()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, trunk_output_grad: Tensor) -> tuple[Tensor, None]:
        return ctx.passing.put(trunk_output_grad), None
