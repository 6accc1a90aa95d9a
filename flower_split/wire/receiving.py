"""A message that arrives as frames: its header at once, its tensors once they have been checked.

A description is checked in full before one byte is allocated for it, and a decoded tensor owns
writable memory. A frame's payload is sliced without a copy; a frame that another implementation has
written with its fields in another order goes through the protobuf parser.

Next: ``flower_split/trunk/service/server.py``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.codecs.codec import Coded, TensorForm
from flower_split.wire.device_memory import device_digest
from flower_split.wire.format import (
    DTYPES,
    HEADER_TAG,
    MAX_DIM,
    MAX_DIMS,
    MAX_NAME,
    MAX_TENSORS,
    PAYLOAD_TAG,
    Layout,
)
from flower_split.wire.placed_payloads import PlacedPayloads
from flower_split.wire.shared_memory import SharedFrames, SharedMemory
from flower_split.wire.staging import Allocate, pooled


def _read_varint(data: memoryview, start: int) -> tuple[int, int] | None:
    """Return the value and the index after it; ``None`` if there is no varint below 2^35."""
    value = 0
    for index in range(start, min(start + 5, len(data))):
        value |= (data[index] & 0x7F) << 7 * (index - start)
        if data[index] < 0x80:
            return value, index + 1
    return None


def _parse(frame: bytes) -> tuple[pb.Header | None, memoryview]:
    """Return the header, if the frame has one, and the payload, without copying it."""
    data = memoryview(frame)
    header, at = None, 0
    if data[:1] == HEADER_TAG:
        length = _read_varint(data, 1)
        if length is None or length[1] + length[0] > len(data):
            return _parse_any(frame)
        at = length[1] + length[0]
        header = _parse_header(bytes(data[length[1] : at]))
    if at == len(data):
        return header, data[at:]
    if data[at : at + 1] == PAYLOAD_TAG:
        length = _read_varint(data, at + 1)
        if length is not None and length[1] + length[0] == len(data):
            return header, data[length[1] :]
    return _parse_any(frame)


def _parse_header(data: bytes) -> pb.Header:
    try:
        return pb.Header.FromString(data)
    except DecodeError as error:
        raise CodecError("a frame's header is not a valid protobuf message.") from error


def _parse_any(frame: bytes) -> tuple[pb.Header | None, memoryview]:
    try:
        message = pb.Frame.FromString(frame)
    except DecodeError as error:
        raise CodecError(f"a frame of {len(frame)} bytes is not a valid protobuf message.") from (
            error
        )
    return (message.header if message.HasField("header") else None), memoryview(message.payload)


@dataclass(frozen=True, slots=True)
class Received:
    """The tensors of a message that has arrived in full.

    Args:
        tensors: By name; writable, each over memory of its own (shared memory keeps the place of
            each until the tensor is gone).
        digest: XXH3 of 128 bits over the descriptions and the payload, to tell a repetition from
            other content; no protection against an attacker. Empty if it was not asked for.
        num_bytes: Bytes of all frames.
    """

    tensors: dict[str, Tensor]
    digest: bytes
    num_bytes: int


class Incoming:
    """A message that is arriving: the header is read at once, the tensors by :meth:`receive`.

    Between the two, the receiver can check who calls and what is announced.

    Args:
        frames: Serialized frames; ``SharedFrames`` where payloads may lie in shared memory. What it
            raises passes through.
        call: What the header must be of; None: anything.
        memory: Asked for the memory that the payloads lie in, if the header says that they do.

    Raises:
        CodecError: The stream is empty, or its first frame has no valid header, or one of another
            call.
    """

    def __init__(
        self,
        frames: Iterator[bytes],
        call: str | None = None,
        memory: Callable[[], SharedMemory | None] | None = None,
    ) -> None:
        self._frames = frames
        first = next(frames, None)
        if first is None:
            raise CodecError("the stream ended before its first frame.")
        header, self._first_payload = _parse(first)
        if header is None:
            raise CodecError("the first frame of a stream must carry the header.")
        found = header.WhichOneof("call")
        if call not in (None, found):
            raise CodecError(f"the header of this call must be of {call!r}; it is of {found!r}.")
        self.header, self._num_bytes = header, len(first)
        # The memory that payloads lie in; None: all come in frames.
        self.shared: SharedMemory | None = None
        self._placed: PlacedPayloads | None = None
        if header.HasField("shared") or header.HasField("device"):
            if memory is not None:
                self.shared = memory()
            elif isinstance(frames, SharedFrames):
                self.shared = frames.memory
            if self.shared is None:
                raise CodecError("the message's payloads lie in memory that nobody shares with it.")
            self._placed = PlacedPayloads(header, self.shared)

    def receive(
        self,
        max_bytes: int,
        *,
        coded: Coded | None = None,
        allocate: Allocate = pooled,
        digest: bool = False,
        admit: Callable[[int], None] | None = None,
    ) -> Received:
        """Check the descriptions, allocate, and fill as the frames arrive.

        The digest is over what travels, so that it needs no decoding to recognise a call that is
        sent again.

        Args:
            max_bytes: Limit on all tensors, as they travel and as they are decoded.
            coded: The tensor that its sender has passed through a codec; None: there is none.
            allocate: Where the payloads go.
            digest: Whether to hash what arrives.
            admit: Told the bytes that decoding takes beside what travels, if any; may refuse them.

        Raises:
            CodecError: A description, the coded tensor or the payload's length is not as it must be.
        """
        layouts = check_specs(self.header.tensors, max_bytes)
        form = None
        if coded is not None:
            announced = {item.name: TensorForm(item.shape, item.dtype) for item in layouts}
            form = coded.form(announced, max_bytes, admit)
        # A digest is waited for, and with it the copies that it reads.
        placed = (
            self._open(self._placed, layouts, not digest) if self._placed else [None] * len(layouts)
        )
        payloads, framed = [], []
        for layout, found in zip(layouts, placed, strict=True):
            payloads.append(allocate(layout.num_bytes) if found is None else found)
            if found is None:
                framed.append(payloads[-1])
        content = xxhash.xxh3_128()
        if digest:
            for layout in layouts:
                content.update(repr((layout.name, str(layout.dtype), layout.shape)).encode())
            for found in placed:
                if found is not None and found.nbytes:
                    on_host = found.device.type == "cpu"
                    content.update(found.numpy().data if on_host else device_digest(found))
        if self._placed is None or not self._placed.fill_no_frame:
            self._fill(framed, content if digest else None)
        tensors = {
            layout.name: decode_tensor(layout, payload)
            for layout, payload in zip(layouts, payloads, strict=True)
        }
        if coded is not None and form is not None:
            tensors = coded.decode(tensors, form)
        if self._placed is not None:
            self._num_bytes = self._placed.num_bytes([layout.num_bytes for layout in layouts])
        return Received(tensors, content.digest() if digest else b"", self._num_bytes)

    def _open(
        self, placed: PlacedPayloads, layouts: list[Layout], complete: bool
    ) -> list[Tensor | None]:
        """Return the payloads that do not come in frames; None for those that do."""
        if placed.fill_no_frame and (
            self._first_payload.nbytes or next(self._frames, None) is not None
        ):
            raise CodecError("a message with payloads in shared memory is one frame without any.")
        sizes = [layout.num_bytes for layout in layouts]
        on_device = [layout.on_device for layout in layouts]
        return placed.open(sizes, on_device, complete=complete)

    def _fill(self, payloads: list[Tensor], content: xxhash.xxh3_128 | None) -> None:
        """Fill the payloads from the stream, and add it to the digest."""
        chunks = self._chunks(sum(payload.nbytes for payload in payloads))
        chunk = memoryview(b"")
        for payload in payloads:
            target, filled = payload.numpy().data, 0
            while filled < target.nbytes:
                if not chunk.nbytes:
                    chunk = next(chunks)
                    if content is not None:
                        content.update(chunk)
                size = min(chunk.nbytes, target.nbytes - filled)
                target[filled : filled + size] = chunk[:size]
                chunk = chunk[size:]
                filled += size
        next(chunks, None)  # runs to the end of the stream, where surplus is found

    def _chunks(self, wanted: int) -> Iterator[memoryview]:
        """Yield the payloads, checked against what is announced; end only with the stream."""
        arrived = self._first_payload.nbytes
        _check_surplus(arrived, wanted)
        if arrived:
            yield self._first_payload
        for frame in self._frames:
            header, payload = _parse(frame)
            if header is not None or not payload.nbytes:
                raise CodecError("every frame after the first must carry payload and no header.")
            self._num_bytes += len(frame)
            arrived += payload.nbytes
            _check_surplus(arrived, wanted)
            yield payload
        if arrived < wanted:
            raise CodecError(
                f"the stream announced {wanted} bytes of payload and ended at {arrived}."
            )


def received(
    frames: Iterator[bytes],
    call: str,
    max_bytes: int,
    *,
    coded: Coded | None = None,
    allocate: Allocate = pooled,
) -> tuple[Received, pb.Header]:
    """Receive a whole message at once; see :class:`Incoming`.

    Returns:
        Its tensors, and its header.
    """
    incoming = Incoming(frames, call)
    return incoming.receive(max_bytes, coded=coded, allocate=allocate), incoming.header


def _check_surplus(arrived: int, wanted: int) -> None:
    if arrived > wanted:
        raise CodecError(
            f"the stream announced {wanted} bytes of payload and sent at least {arrived}."
        )


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
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise CodecError(f"tensor {name!r} has the unknown dtype number {spec.dtype}.")
    if len(shape) > MAX_DIMS or any(size > MAX_DIM for size in shape):
        raise CodecError(
            f"tensor {name!r} must have at most {MAX_DIMS} dimensions of at most {MAX_DIM}; it has "
            f"{len(shape)}, the largest {max(shape)}."
        )
    count = math.prod(shape)
    decoded = count * dtype.itemsize
    wanted_codec = pb.BITS if dtype == torch.bool else pb.RAW
    if spec.codec != wanted_codec:
        raise CodecError(
            f"tensor {name!r} of {dtype} must use codec {pb.Codec.Name(wanted_codec)}; it uses "
            f"number {spec.codec}."
        )
    if spec.on_device and dtype == torch.bool:
        raise CodecError(f"tensor {name!r} of booleans travels as bits, and cannot stay on a GPU.")
    num_bytes = (count + 7) // 8 if dtype == torch.bool else decoded
    if spec.num_bytes != num_bytes:
        raise CodecError(
            f"tensor {name!r} of {dtype} {list(shape)} takes {num_bytes} bytes; its description "
            f"says {spec.num_bytes}."
        )
    return Layout(name, dtype, shape, num_bytes, spec.on_device), decoded


def decode_tensor(layout: Layout, payload: Tensor) -> Tensor:
    """Return the tensor of a payload, uint8 [layout.num_bytes]; a ``RAW`` one is a view of it."""
    if layout.dtype == torch.bool:
        count = math.prod(layout.shape)
        bits = np.unpackbits(payload.numpy(), count=count, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).reshape(layout.shape)
    return payload.view(layout.dtype).reshape(layout.shape)
