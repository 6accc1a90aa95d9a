"""A header and tensors as a stream of frames of at most 1 MiB, and back.

A frame is a protobuf ``Frame`` whose last field is the payload, so that a sender writes it as
``header + tag + length + bytes`` joined once, and a receiver slices it without a copy; a frame that
another implementation has written otherwise goes through the protobuf parser. The first frame
carries the header; the payloads of all frames, joined, are the tensors in the header's order.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.codec import Layout, check_specs, decode_tensor, encode_tensor
from flower_split.wire.staging import Allocate, pooled

FRAME_BYTES = 1 << 20  # 256 KiB to 2 MiB are equally fast; larger delays the calls beside it
MAX_HEADER_BYTES = 6 << 20  # a header is one gRPC message, whose limit is 8 MiB

_HEADER_TAG = b"\x0a"  # field 1, length-delimited
_PAYLOAD_TAG = b"\x7a"  # field 15, length-delimited


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: memoryview, start: int) -> tuple[int, int] | None:
    """Return the value and the index after it; ``None`` if there is no varint below 2^35."""
    value = 0
    for index in range(start, min(start + 5, len(data))):
        value |= (data[index] & 0x7F) << 7 * (index - start)
        if data[index] < 0x80:
            return value, index + 1
    return None


class Outgoing:
    """A message to send: :meth:`frames` may be called again for every attempt.

    Args:
        header: The call's header; its ``tensors`` are filled in here.
        tensors: Dense CPU tensors by name, in payload order. They must not change until sent.

    Attributes:
        num_bytes: Of all frames.

    Raises:
        CodecError: A tensor has no place on the wire, or the header is too large.
    """

    def __init__(self, header: pb.Header, tensors: Mapping[str, Tensor]) -> None:
        encoded = [encode_tensor(name, tensor) for name, tensor in tensors.items()]
        header.tensors.extend(item.spec for item in encoded)
        serialized = header.SerializeToString()
        if len(serialized) > MAX_HEADER_BYTES:
            raise CodecError(
                f"the header of a message may have {MAX_HEADER_BYTES} bytes; this one, describing "
                f"{len(encoded)} tensors, has {len(serialized)}."
            )
        header_bytes = _HEADER_TAG + _varint(len(serialized)) + serialized
        self._parts = [item.data for item in encoded if item.data.nbytes]
        self._plan = _planned(header_bytes, sum(part.nbytes for part in self._parts))
        self.num_bytes = sum(len(prefix) + size for prefix, size in self._plan)

    def frames(self) -> Iterator[bytes]:
        """Yield the frames, each made when it is asked for."""
        parts = iter(self._parts)
        part, used = memoryview(b""), 0
        for prefix, size in self._plan:
            pieces: list[bytes | memoryview] = [prefix]
            while size:
                if used == part.nbytes:
                    part, used = next(parts), 0
                piece = part[used : used + size]
                pieces.append(piece)
                used += piece.nbytes
                size -= piece.nbytes
            yield b"".join(pieces)


def _planned(header: bytes, payload_bytes: int) -> list[tuple[bytes, int]]:
    """Return, for every frame, the bytes before its payload and the payload's size."""
    overhead = 1 + 5  # the tag and the longest length
    size = min(payload_bytes, max(0, FRAME_BYTES - len(header) - overhead))
    plan = [(header + (_PAYLOAD_TAG + _varint(size) if size else b""), size)]
    left = payload_bytes - size
    while left:
        size = min(left, FRAME_BYTES - overhead)
        plan.append((_PAYLOAD_TAG + _varint(size), size))
        left -= size
    return plan


def _parse(frame: bytes) -> tuple[pb.Header | None, memoryview]:
    """Return the header, if the frame has one, and the payload, without copying it."""
    data = memoryview(frame)
    header, at = None, 0
    if data[:1] == _HEADER_TAG:
        length = _read_varint(data, 1)
        if length is None or length[1] + length[0] > len(data):
            return _parse_any(frame)
        at = length[1] + length[0]
        header = _parse_header(bytes(data[length[1] : at]))
    if at == len(data):
        return header, data[at:]
    if data[at : at + 1] == _PAYLOAD_TAG:
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
        tensors: By name; writable, each over memory of its own.
        digest: SHA-256 over the descriptions and the payload; empty if it was not asked for.
        num_bytes: Bytes of all frames.
    """

    tensors: dict[str, Tensor]
    digest: bytes
    num_bytes: int


class Incoming:
    """A message that is arriving: the header is read at once, the tensors by :meth:`receive`.

    Between the two, the receiver can check who calls and what is announced.

    Args:
        frames: Serialized frames. What it raises passes through.

    Raises:
        CodecError: The stream is empty, or its first frame has no valid header.
    """

    def __init__(self, frames: Iterator[bytes]) -> None:
        self._frames = frames
        first = next(frames, None)
        if first is None:
            raise CodecError("the stream ended before its first frame.")
        header, self._first_payload = _parse(first)
        if header is None:
            raise CodecError("the first frame of a stream must carry the header.")
        self.header = header
        self._num_bytes = len(first)
        self._checked: tuple[int, list[Layout]] | None = None  # within which limit

    def expect(self, call: str) -> None:
        """Check that the header is of ``call``.

        Raises:
            CodecError: It is not.
        """
        found = self.header.WhichOneof("call")
        if found != call:
            raise CodecError(f"the header of this call must be of {call!r}; it is of {found!r}.")

    def layouts(self, max_bytes: int) -> list[Layout]:
        """Check the descriptions of the tensors, once per limit, and return their layouts in order.

        Args:
            max_bytes: Limit on the decoded size of all tensors.

        Raises:
            CodecError: A description is wrong, or the limit is passed.
        """
        if self._checked is None or self._checked[0] != max_bytes:
            self._checked = max_bytes, check_specs(self.header.tensors, max_bytes)
        return self._checked[1]

    def receive(
        self, max_bytes: int, *, allocate: Allocate = pooled, digest: bool = False
    ) -> Received:
        """Check the descriptions, allocate, and fill as the frames arrive.

        Args:
            max_bytes: Limit on the decoded size of all tensors.
            allocate: Where the payloads go.
            digest: Whether to hash what arrives.

        Raises:
            CodecError: A description is wrong, or the payload is shorter or longer than announced.
        """
        layouts = self.layouts(max_bytes)
        wanted = sum(layout.num_bytes for layout in layouts)
        sha = hashlib.sha256() if digest else None
        if sha:
            for layout in layouts:
                sha.update(repr((layout.name, str(layout.dtype), layout.shape)).encode())
        chunks = self._chunks(wanted)
        chunk = memoryview(b"")
        payloads: list[Tensor] = []
        for layout in layouts:
            payload = allocate(layout.num_bytes)
            target, filled = payload.numpy().data, 0
            while filled < layout.num_bytes:
                if not chunk.nbytes:
                    chunk = next(chunks)
                    if sha:
                        sha.update(chunk)
                size = min(chunk.nbytes, layout.num_bytes - filled)
                target[filled : filled + size] = chunk[:size]
                chunk = chunk[size:]
                filled += size
            payloads.append(payload)
        next(chunks, None)  # runs to the end of the stream, where surplus is found
        tensors = {
            layout.name: decode_tensor(layout, payload)
            for layout, payload in zip(layouts, payloads, strict=True)
        }
        return Received(tensors, sha.digest() if sha else b"", self._num_bytes)

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


def _check_surplus(arrived: int, wanted: int) -> None:
    if arrived > wanted:
        raise CodecError(
            f"the stream announced {wanted} bytes of payload and sent at least {arrived}."
        )
