"""The codecs that send a tensor as it is, or cast to another floating-point type."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.codecs.codec import Codec, TensorForm

_WHOLE = ""  # the name of the one part


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
