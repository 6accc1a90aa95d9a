"""Frames against the plain protobuf serialisation of the same messages, and against garbage."""

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.format import FRAME_BYTES
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing, encode_tensor

LIMIT = 1 << 26


def header() -> pb.Header:
    return pb.Header(forward=pb.ForwardHeader(session="s", version=7))


def receive(frames: list[bytes], limit: int = LIMIT) -> dict[str, torch.Tensor]:
    return Incoming(iter(frames)).receive(limit).tensors


def frames_of(**tensors: torch.Tensor) -> list[bytes]:
    return list(Outgoing(header(), tensors).frames())


@pytest.mark.parametrize("numbers", [0, 1, 100, 262_100, 262_144, 262_145, 1_000_003])
def test_frames_are_what_protobuf_would_parse(numbers: int) -> None:
    values = torch.arange(numbers, dtype=torch.float32)
    mask = values > 3
    frames = frames_of(values=values, mask=mask)
    assert all(len(frame) <= FRAME_BYTES for frame in frames)
    parsed = [pb.Frame.FromString(frame) for frame in frames]
    assert [message.HasField("header") for message in parsed] == [True] + [False] * (
        len(parsed) - 1
    )
    assert parsed[0].header.forward == header().forward
    payload = b"".join(message.payload for message in parsed)
    assert payload == values.numpy().tobytes() + bytes(encode_tensor("mask", mask).data)
    back = receive(frames)
    assert torch.equal(back["values"], values) and torch.equal(back["mask"], mask)


def test_frames_written_by_the_protobuf_library_are_understood() -> None:
    values = torch.arange(10, dtype=torch.int64)
    encoded = encode_tensor("values", values)
    full = header()
    full.tensors.append(encoded.spec)
    data = bytes(encoded.data)
    frames = [
        pb.Frame(header=full, payload=data[:30]).SerializeToString(),
        # Field 15 twice: legal protobuf, the last one counts; the fast path must not be taken.
        b"\x7a\x02no" + pb.Frame(payload=data[30:]).SerializeToString(),
    ]
    assert torch.equal(receive(frames)["values"], values)


def test_frames_can_be_made_again_for_a_retry() -> None:
    message = Outgoing(header(), {"t": torch.arange(400_000, dtype=torch.float32)})
    first, second = list(message.frames()), list(message.frames())
    assert first == second and len(first) == 2
    assert message.num_bytes == sum(map(len, first))


def test_received_tensors_are_writable_and_separate() -> None:
    frames = frames_of(a=torch.zeros(3), b=torch.zeros(3), c=torch.zeros((), dtype=torch.bfloat16))
    back = receive(frames)
    back["a"].fill_(5)
    back["c"].fill_(1)
    assert back["b"].tolist() == [0, 0, 0]
    assert receive(frames)["a"].tolist() == [0, 0, 0]


def test_digest_names_payload_shape_and_dtype() -> None:
    def digest(tensor: torch.Tensor) -> bytes:
        return Incoming(iter(frames_of(t=tensor))).receive(LIMIT, digest=True).digest

    base = torch.arange(6, dtype=torch.float32)
    assert digest(base) == digest(base.clone())
    assert len(digest(base)) == 16  # XXH3 of 128 bits
    other = base.clone()
    other[5] = -1
    assert len({digest(t) for t in (base, other, base.reshape(2, 3), base.view(torch.int32))}) == 4


def test_stream_that_ends_early_raises() -> None:
    frames = frames_of(t=torch.zeros(600_000))
    assert len(frames) == 3
    with pytest.raises(CodecError, match="announced 2400000 bytes of payload and ended at"):
        receive(frames[:2])


def test_stream_with_surplus_payload_raises() -> None:
    frames = frames_of(t=torch.zeros(600_000))
    with pytest.raises(CodecError, match="announced 2400000 bytes of payload and sent"):
        receive([*frames, b"\x7a\x01x"])


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([], "before its first frame"),
        ([b""], "must carry the header"),
        ([b"\x7a\x01x"], "must carry the header"),
        ([b"\x0a\xff\xff\xff\xff\xff\xff\xff"], "not a valid protobuf"),
        ([frames_of()[0], b""], "must carry payload"),
        ([frames_of()[0], frames_of()[0]], "must carry payload and no header"),
    ],
)
def test_stream_that_breaks_the_framing_raises(frames: list[bytes], match: str) -> None:
    with pytest.raises(CodecError, match=match):
        receive(frames)


def test_announced_tensor_above_the_limit_is_not_allocated() -> None:
    (first,) = frames_of(t=torch.zeros(10))
    message = pb.Frame.FromString(first)
    message.header.tensors[0].shape[:] = [1 << 30]
    message.header.tensors[0].num_bytes = 1 << 32
    asked: list[int] = []

    def allocate(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    with pytest.raises(CodecError, match="may hold"):
        Incoming(iter([message.SerializeToString()])).receive(LIMIT, allocate=allocate)
    assert asked == []


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_bytes_raise_codec_error_or_parse(frames: list[bytes]) -> None:
    tracemalloc.start()
    try:
        receive(frames, limit=1 << 16)
    except CodecError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10 << 20


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_frames_raise_codec_error_or_parse(data: st.DataObject) -> None:
    frames = frames_of(a=torch.arange(9, dtype=torch.float32), m=torch.ones(5, dtype=torch.bool))
    damaged = bytearray(frames[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        tensors = receive([bytes(damaged[:cut])], limit=1 << 16)
    except CodecError:
        return
    assert sum(t.nbytes for t in tensors.values()) <= 1 << 16


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**32 - 1))
def test_any_tensors_cut_into_any_frames_come_back(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{index}": torch.randn(size, 3, generator=generator) for index, size in enumerate(sizes)
    }
    (single,) = Outgoing(header(), tensors).frames()
    message = pb.Frame.FromString(single)
    step = seed % 50 + 1
    payload = message.payload
    frames = [pb.Frame(header=message.header).SerializeToString()] + [
        pb.Frame(payload=payload[at : at + step]).SerializeToString()
        for at in range(0, len(payload), step)
    ]
    back = receive(frames)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
