"""An activation codec: eight bits a value, and one scale for each position."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.codecs import Codec, TensorForm


class RowInt8Codec(Codec):
    """Round to 255 levels between minus and plus the largest magnitude of each position.

    The error of a value is at most 1/254 of that magnitude.
    """

    dtype: ClassVar[torch.dtype | None] = torch.float32

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return ``levels``, uint8 [..., n], and ``scale``, float32 [..., 1]."""
        scale = tensor.abs().amax(dim=-1, keepdim=True) / 127
        levels = torch.where(scale > 0, tensor / scale, 0).round().add(128)
        return {"levels": levels.to(torch.uint8), "scale": scale}

    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of the levels, as float32."""
        if parts.keys() != {"levels", "scale"}:
            raise CodecError(f"the parts are levels and scale; there are {sorted(parts)}.")
        levels, scale = parts["levels"], parts["scale"]
        if levels.dtype != torch.uint8 or scale.dtype != torch.float32:
            raise CodecError(f"levels are uint8 and scale is float32; they are {levels}, {scale}.")
        if not levels.shape or scale.shape != (*levels.shape[:-1], 1):
            raise CodecError(f"there is one scale for each row; they are {levels}, {scale}.")
        return TensorForm(levels.shape, torch.float32)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return levels times scale."""
        return (parts["levels"].float() - 128) * parts["scale"]
