"""The format of a message: a header and tensors as frames. Both directions use what is named here.

A frame is a protobuf ``Frame`` whose last field is the payload. The first frame carries the header,
which describes the tensors (``TensorSpec``); the payloads of all frames, joined, are the tensors in
the header's order: little-endian, contiguous and row-major (``RAW``), booleans eight to a byte
(``BITS``). bf16 is its raw 16-bit pattern.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch

from flower_split.proto import trunk_pb2 as pb

FRAME_BYTES = 1 << 20  # 256 KiB to 2 MiB are equally fast; larger delays the calls beside it
MAX_HEADER_BYTES = 6 << 20  # a header is one gRPC message, whose limit is 8 MiB

HEADER_TAG = b"\x0a"  # field 1, length-delimited
PAYLOAD_TAG = b"\x7a"  # field 15, length-delimited

MAX_DIMS = 8
MAX_DIM = (1 << 31) - 1
MAX_TENSORS = 1 << 16
MAX_NAME = 512  # characters

DTYPES: MappingProxyType[int, torch.dtype] = MappingProxyType(
    {
        pb.FLOAT32: torch.float32,
        pb.BFLOAT16: torch.bfloat16,
        pb.FLOAT16: torch.float16,
        pb.INT64: torch.int64,
        pb.INT32: torch.int32,
        pb.UINT8: torch.uint8,
        pb.BOOL: torch.bool,
        pb.FLOAT64: torch.float64,
    }
)
NUMBERS: MappingProxyType[torch.dtype, pb.DType] = MappingProxyType(
    {
        torch.float32: pb.FLOAT32,
        torch.bfloat16: pb.BFLOAT16,
        torch.float16: pb.FLOAT16,
        torch.int64: pb.INT64,
        torch.int32: pb.INT32,
        torch.uint8: pb.UINT8,
        torch.bool: pb.BOOL,
        torch.float64: pb.FLOAT64,
    }
)


@dataclass(frozen=True, slots=True)
class Layout:
    """A description that has passed every check.

    Args:
        name: The tensor's name within its message.
        dtype: The decoded tensor's dtype.
        shape: The decoded tensor's shape.
        num_bytes: In the payload.
        on_device: Whether the payload lies in memory of a GPU.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    on_device: bool = False
