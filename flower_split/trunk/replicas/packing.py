"""Several tensors as one run of bytes on a device, so that one message carries them all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; no dtype needs more to be viewed in place


@dataclass(frozen=True, slots=True)
class Packed:
    """Where one tensor lies in the bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int  # byte

    @property
    def num_bytes(self) -> int:
        """Return its length."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = tuple[Packed, ...]


def length_of(layout: Layout) -> int:
    """Return the bytes that tensors of ``layout`` take together, each at its place."""
    return 0 if not layout else layout[-1].first + layout[-1].num_bytes


def pack(tensors: Sequence[Tensor], device: torch.device) -> tuple[Layout, Tensor]:
    """Return where each tensor lies, and the bytes, ``[length]`` of uint8 on ``device``.

    Args:
        tensors: On any device; they are copied.
        device: Of the bytes.
    """
    places = []
    first = 0
    for tensor in tensors:
        first = -(-first // _ALIGNMENT) * _ALIGNMENT
        places.append(Packed(tuple(tensor.shape), tensor.dtype, first))
        first += places[-1].num_bytes
    layout = tuple(places)
    buffer = torch.empty(length_of(layout), dtype=torch.uint8, device=device)
    if tensors:  # hundreds of small ones: a few kernels for all, not one for each
        torch._foreach_copy_(unpack(layout, buffer), [tensor.detach() for tensor in tensors])
    return layout, buffer


def unpack(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """Return the tensors of ``layout`` as views of ``buffer``."""
    return [
        buffer[one.first : one.first + one.num_bytes].view(one.dtype).view(one.shape)
        for one in layout
    ]
