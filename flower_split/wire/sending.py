"""A header and tensors as a stream of frames of at most 1 MiB; no pickle.

A tensor is sent as its typed description and its own memory: a frame is written as ``header + tag +
length + bytes``, joined once. :mod:`flower_split.wire.receiving` is the way back.

Next: ``flower_split/wire/receiving.py``, then ``flower_split/trunk/service/server.py``.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.format import (
    FRAME_BYTES,
    HEADER_TAG,
    MAX_HEADER_BYTES,
    NUMBERS,
    PAYLOAD_TAG,
)
from flower_split.wire.shared_slots import Place
from flower_split.wire.staging import tensors_to_host


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


def encode_tensor(name: str, tensor: Tensor) -> Encoded:
    """Describe a CPU tensor and expose its bytes, without a copy where it is contiguous.

    Raises:
        CodecError: Its dtype, device or layout has no place on the wire.
    """
    if tensor.dtype not in NUMBERS:
        raise CodecError(
            f"tensor {name!r} has dtype {tensor.dtype}; the wire carries "
            f"{', '.join(str(d).removeprefix('torch.') for d in NUMBERS)}. Convert it first."
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
        dtype=NUMBERS[tensor.dtype],
        shape=tensor.shape,
        codec=codec,
        num_bytes=data.nbytes,
    )
    return Encoded(spec, data)


def describe_on_device(name: str, tensor: Tensor) -> Encoded:
    """Describe a tensor whose bytes stay on its GPU.

    Raises:
        CodecError: Its dtype has no place on the wire, or is packed there.
    """
    if tensor.dtype not in NUMBERS or tensor.dtype == torch.bool:
        raise CodecError(f"tensor {name!r} of {tensor.dtype} cannot stay on its GPU.")
    spec = pb.TensorSpec(
        name=name,
        dtype=NUMBERS[tensor.dtype],
        shape=tensor.shape,
        codec=pb.RAW,
        num_bytes=tensor.nbytes,
        on_device=True,
    )
    return Encoded(spec, memoryview(b""))


class Outgoing:
    """A message to send: :meth:`frames` may be called again for every attempt.

    Args:
        header: The call's header; its ``tensors`` are filled in here.
        tensors: Dense tensors by name, in payload order, on the CPU but for those that stay on a GPU.
            They must not change until sent.
        staying: Names of those that stay on a GPU: :meth:`placed_on_device` says where, or
            :meth:`on_host` gives the message without them.

    Attributes:
        num_bytes: Bytes of all frames, as if everything went in them.
        tensor_bytes: Bytes of the tensors in memory.
        plan: Of every frame, the bytes before its payload and the payload's size.
        payloads: Those of the tensors that have one on the CPU, in their order.
        staying: The tensors that stay on a GPU, in their order.

    Raises:
        CodecError: A tensor has no place on the wire, or the header is too large.
    """

    def __init__(
        self,
        header: pb.Header,
        tensors: Mapping[str, Tensor],
        staying: Collection[str] = (),
    ) -> None:
        encoded = [
            describe_on_device(name, tensor) if name in staying else encode_tensor(name, tensor)
            for name, tensor in tensors.items()
        ]
        self._header, self._tensors = header, tensors
        self.staying = [tensor for name, tensor in tensors.items() if name in staying]
        header.tensors.extend(item.spec for item in encoded)
        serialized = header.SerializeToString()
        if len(serialized) > MAX_HEADER_BYTES:
            raise CodecError(
                f"the header of a message may have {MAX_HEADER_BYTES} bytes; this one, describing "
                f"{len(encoded)} tensors, has {len(serialized)}."
            )
        self._serialized = serialized
        header_bytes = HEADER_TAG + _varint(len(serialized)) + serialized
        self.payloads = [item.data for item in encoded if item.data.nbytes]
        self.plan = _planned(header_bytes, sum(part.nbytes for part in self.payloads))
        self.tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.num_bytes = sum(len(prefix) + size for prefix, size in self.plan)
        if self.staying:
            there = sum(tensor.nbytes for tensor in self.staying)
            here = sum(part.nbytes for part in self.payloads)
            self.num_bytes = framed_bytes(len(serialized), here + there)

    def frames(self) -> Iterator[bytes]:
        """Yield the frames, each made when it is asked for."""
        parts = iter(self.payloads)
        part, used = memoryview(b""), 0
        for prefix, size in self.plan:
            pieces: list[bytes | memoryview] = [prefix]
            while size:
                if used == part.nbytes:
                    part, used = next(parts), 0
                piece = part[used : used + size]
                pieces.append(piece)
                used += piece.nbytes
                size -= piece.nbytes
            yield b"".join(pieces)

    def placed_on_device(self, place: Place) -> "Outgoing":
        """Return the message with the place of the tensors that stay on a GPU."""
        there = pb.SharedPayload(slot=place.slot, generation=place.generation, offset=place.offset)
        serialized = self._serialized + pb.Header(device=there).SerializeToString()
        message = copy.copy(self)
        message._serialized = serialized
        header_bytes = HEADER_TAG + _varint(len(serialized)) + serialized
        message.plan = _planned(header_bytes, sum(part.nbytes for part in self.payloads))
        return message

    def on_host(self) -> "Outgoing":
        """Return the message with copies on the CPU of the tensors that stay on a GPU."""
        if not self.staying:
            return self
        header = pb.Header()
        header.CopyFrom(self._header)
        header.ClearField("tensors")
        return Outgoing(header, tensors_to_host(self._tensors))

    def placed(self, place: Place) -> "Outgoing":
        """Return the message as the one frame that says where its payloads lie.

        Its :attr:`num_bytes` stay those of all frames, so that what is counted is the same.
        """
        shared = pb.SharedPayload(slot=place.slot, generation=place.generation, offset=place.offset)
        serialized = self._serialized + pb.Header(shared=shared).SerializeToString()
        message = copy.copy(self)
        message.payloads = []
        message.plan = [(HEADER_TAG + _varint(len(serialized)) + serialized, 0)]
        return message


def framed_bytes(header_bytes: int, payload_bytes: int) -> int:
    """Return the bytes of all frames of a message.

    Args:
        header_bytes: Size of the serialized header alone.
        payload_bytes: Size of all tensors' payloads.
    """
    header = HEADER_TAG + _varint(header_bytes) + bytes(header_bytes)
    return sum(len(prefix) + size for prefix, size in _planned(header, payload_bytes))


def _planned(header: bytes, payload_bytes: int) -> list[tuple[bytes, int]]:
    """Return, for every frame, the bytes before its payload and the payload's size."""
    overhead = 1 + 5  # the tag and the longest length
    size = min(payload_bytes, max(0, FRAME_BYTES - len(header) - overhead))
    plan = [(header + (PAYLOAD_TAG + _varint(size) if size else b""), size)]
    whole = FRAME_BYTES - overhead
    count, rest = divmod(payload_bytes - size, whole)
    plan += [(PAYLOAD_TAG + _varint(whole), whole)] * count
    return plan + [(PAYLOAD_TAG + _varint(rest), rest)] * (rest > 0)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
