"""A tensor as a typed, checked description (``TensorSpec``) and bytes, and back.

Bytes are little-endian, contiguous and row-major (``RAW``); booleans travel eight to a byte
(``BITS``). bf16 is its raw 16-bit pattern. A description is checked in full before one byte is
allocated for it, and a decoded tensor owns writable memory. :mod:`flower_split.wire.frames` cuts
the bytes into messages.

Next: ``flower_split/trunk/service/server.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb

MAX_DIMS = 8
MAX_DIM = (1 << 31) - 1
MAX_TENSORS = 1 << 16
MAX_NAME = 512  # characters

_DTYPES: dict[int, torch.dtype] = {
    pb.FLOAT32: torch.float32,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT16: torch.float16,
    pb.INT64: torch.int64,
    pb.INT32: torch.int32,
    pb.UINT8: torch.uint8,
    pb.BOOL: torch.bool,
}
_NUMBERS: dict[torch.dtype, pb.DType] = {
    torch.float32: pb.FLOAT32,
    torch.bfloat16: pb.BFLOAT16,
    torch.float16: pb.FLOAT16,
    torch.int64: pb.INT64,
    torch.int32: pb.INT32,
    torch.uint8: pb.UINT8,
    torch.bool: pb.BOOL,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor ready to send.

    Args:
        spec: Its description.
        data: Its payload, uint8; for ``RAW`` the tensor's own memory, so the tensor must not be
            changed until it is sent.
    """

    spec: pb.TensorSpec
    data: memoryview


@dataclass(frozen=True, slots=True)
class Layout:
    """A description that has passed every check.

    Args:
        name: The tensor's name within its message.
        dtype: Of the decoded tensor.
        shape: Of the decoded tensor.
        num_bytes: In the payload.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


def encode_tensor(name: str, tensor: Tensor) -> Encoded:
    """Describe a CPU tensor and expose its bytes, without a copy where it is contiguous.

    Raises:
        CodecError: Its dtype, device or layout has no place on the wire.
    """
    if tensor.dtype not in _NUMBERS:
        raise CodecError(
            f"tensor {name!r} has dtype {tensor.dtype}; the wire carries "
            f"{', '.join(str(d).removeprefix('torch.') for d in _NUMBERS)}. Convert it first."
        )
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise CodecError(
            f"tensor {name!r} is {tensor.layout} on {tensor.device}; only dense CPU tensors are "
            "encoded. Move it to the CPU first."
        )
    flat = tensor.detach().contiguous().reshape(-1)
    if tensor.dtype == torch.bool:
        packed = np.packbits(flat.numpy(), bitorder="little")
        codec, data = pb.BITS, packed.data
    else:
        codec, data = pb.RAW, flat.view(torch.uint8).numpy().data
    spec = pb.TensorSpec(
        name=name,
        dtype=_NUMBERS[tensor.dtype],
        shape=tensor.shape,
        codec=codec,
        num_bytes=data.nbytes,
    )
    return Encoded(spec, data)


def check_specs(specs: Iterable[pb.TensorSpec], max_bytes: int) -> list[Layout]:
    """Check the descriptions of one message and return their layouts; nothing is allocated.

    Args:
        specs: In payload order.
        max_bytes: Limit on the sum of the *decoded* sizes.

    Raises:
        CodecError: A name is repeated or too long, a dtype or codec is unknown or does not fit, a
            dimension is out of range, the byte count contradicts the shape, or the sum exceeds
            the limit.
    """
    layouts: dict[str, Layout] = {}
    total = 0
    for spec in specs:
        layout, decoded = _check_spec(spec)
        if layout.name in layouts:
            raise CodecError(f"tensor {layout.name!r} is described twice in one message.")
        total += decoded
        if total > max_bytes:
            raise CodecError(
                f"the tensors of one message may hold {max_bytes} bytes; up to {layout.name!r} "
                f"they hold {total}. Send smaller micro-batches (train.batch-size, "
                "train.sequence-length)."
            )
        if len(layouts) == MAX_TENSORS:
            raise CodecError(f"one message may carry {MAX_TENSORS} tensors, not more.")
        layouts[layout.name] = layout
    return list(layouts.values())


def _check_spec(spec: pb.TensorSpec) -> tuple[Layout, int]:
    """Return the layout and its decoded size in bytes."""
    name, shape = spec.name, tuple(spec.shape)
    if not 0 < len(name) <= MAX_NAME:
        raise CodecError(
            f"a tensor's name must have 1 to {MAX_NAME} characters; one has {len(name)}."
        )
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None:
        raise CodecError(f"tensor {name!r} has the unknown dtype number {spec.dtype}.")
    if len(shape) > MAX_DIMS or any(size > MAX_DIM for size in shape):
        raise CodecError(
            f"tensor {name!r} must have at most {MAX_DIMS} dimensions of at most {MAX_DIM}; it has "
            f"{len(shape)}, the largest {max(shape)}."
        )
    count = 1
    for size in shape:
        count *= size
    decoded = count * dtype.itemsize
    wanted_codec = pb.BITS if dtype == torch.bool else pb.RAW
    if spec.codec != wanted_codec:
        raise CodecError(
            f"tensor {name!r} of {dtype} must use codec {pb.Codec.Name(wanted_codec)}; it uses "
            f"number {spec.codec}."
        )
    num_bytes = (count + 7) // 8 if dtype == torch.bool else decoded
    if spec.num_bytes != num_bytes:
        raise CodecError(
            f"tensor {name!r} of {dtype} {list(shape)} takes {num_bytes} bytes; its description "
            f"says {spec.num_bytes}."
        )
    return Layout(name, dtype, shape, num_bytes), decoded


def decode_tensor(layout: Layout, payload: Tensor) -> Tensor:
    """Return the tensor of a received payload.

    Args:
        layout: Its checked description.
        payload: uint8 [layout.num_bytes], contiguous, aligned to 8 bytes. ``RAW`` tensors are a
            view of it.
    """
    if layout.dtype == torch.bool:
        count = 1
        for size in layout.shape:
            count *= size
        bits = np.unpackbits(payload.numpy(), count=count, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).reshape(layout.shape)
    return payload.view(layout.dtype).reshape(layout.shape)
