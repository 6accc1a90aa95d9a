"""What an activation codec is, and those built in that cast.

Four kinds of tensor pass through one: smashed data, ``trunk_output`` and their gradients, all
``[batch, seq, hidden]``. Masks, position ids and what else goes with a forward travel as they are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.errors import CodecError

_WHOLE = ""  # the name of the one part


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor before its bytes are there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of such a tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Codec(ABC):
    """How activations travel; register one in the entry-point group ``flower_split.codecs``.

    An instance is made without arguments for each session of a client, and one for the trunk, which
    uses it from several threads at once: keep no state. The same tensor must always give the same
    bits: a call that is sent again is recognised by a digest of what travels.
    """

    dtype: ClassVar[torch.dtype | None] = None
    """What a tensor is cast to before it is encoded, on the device it is on; None: its own dtype."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return what travels, by the name of each part.

        Args:
            tensor: On the CPU, of :attr:`dtype` if that is set; never changed.

        Returns:
            Dense CPU tensors of the wire's dtypes (float64, float32, bfloat16, float16, int64, int32,
            uint8, bool). Sizes that no part tells can travel as the shape of an empty one: it takes no
            payload, and :meth:`form` sees it before anything is allocated.
        """

    @abstractmethod
    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of the tensor that ``parts`` decode to: that which was encoded.

        It is called before memory is allocated for the payload, with what the sender announces.

        Raises:
            CodecError: The parts are not what :meth:`encode` gives for any tensor.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor, of the form that :meth:`form` gave.

        Args:
            parts: As they arrived, each over writable memory of its own; may be given back.

        Raises:
            CodecError: A value is one that :meth:`encode` never gives.
        """


class NativeCodec(Codec):
    """Send a tensor as it is, bit for bit."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensor itself."""
        return {_WHOLE: tensor}

    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of the one part."""
        if parts.keys() != {_WHOLE}:
            raise CodecError(f"one part without a name is sent; there are {sorted(parts)}.")
        form = parts[_WHOLE]
        if self.dtype is not None and form.dtype != self.dtype:
            raise CodecError(f"the part must be {self.dtype}; it is {form}.")
        return form

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the one part."""
        return parts[_WHOLE]


class Float32Codec(NativeCodec):
    """Cast to float32 for the journey."""

    dtype: ClassVar[torch.dtype | None] = torch.float32


class BFloat16Codec(NativeCodec):
    """Cast to bfloat16 for the journey, rounding to the nearest, ties to even."""

    dtype: ClassVar[torch.dtype | None] = torch.bfloat16


def stays_on_device(codec: Codec) -> bool:
    """Return whether what a codec encodes and decodes is the tensor itself, wherever it lies.

    A plug-in's subclass of these may do anything, and is told CPU tensors.
    """
    return type(codec) in (NativeCodec, Float32Codec, BFloat16Codec)
