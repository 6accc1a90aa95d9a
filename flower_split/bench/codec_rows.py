"""What a codec does at one end of the wire: a tensor cast and encoded, and decoded again."""

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from flower_split.bench.figures import Row
from flower_split.bench.turns import in_turns
from flower_split.wire.codecs import Codec, make_codec

CODECS = ("bfloat16", "int8")


def _encode(codec: Codec, tensor: Tensor, dtype: torch.dtype) -> None:
    codec.encode(tensor.to(dtype))


def _decode(codec: Codec, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    codec.decode(parts).to(dtype)


def codec_rows(prefix: str, tensor: Tensor, repeats: int) -> list[Row]:
    """Time the codecs in turns with a copy of the tensor.

    Args:
        prefix: Begins the rows' names.
        tensor: float32 [batch, seq, hidden].
        repeats: Turns that count.
    """
    base, target = f"{prefix}copy of a tensor", torch.empty_like(tensor)
    ways: dict[str, Callable[[], object]] = {base: partial(target.copy_, tensor)}
    share: dict[str, float] = {}
    for name in CODECS:
        codec = make_codec(name)
        dtype = codec.dtype or tensor.dtype
        parts = codec.encode(tensor.to(dtype))
        encode, decode = f"{prefix}{name}, encode", f"{prefix}{name}, decode"
        ways[encode] = partial(_encode, codec, tensor, dtype)
        ways[decode] = partial(_decode, codec, parts, tensor.dtype)
        share[encode] = sum(part.nbytes for part in parts.values()) / tensor.nbytes
    return [
        Row(
            what=name,
            seconds=seconds,
            base=base,
            beside={
                "GB/s": tensor.nbytes / statistics.median(seconds) / 1e9,
                **({"of its bytes": share[name]} if name in share else {}),
            },
        )
        for name, seconds in in_turns(ways, repeats).items()
    ]
