"""The tensor codec against torch itself: round trips, and refusal of every wrong description."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.receiving import check_specs, decode_tensor
from flower_split.wire.sending import encode_tensor

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def bits_of(tensor: torch.Tensor) -> list[int]:
    """The tensor's bytes, so that NaN patterns and negative zeros compare too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def round_trip(tensor: torch.Tensor) -> torch.Tensor:
    encoded = encode_tensor("t", tensor)
    spec = pb.TensorSpec.FromString(encoded.spec.SerializeToString())
    (layout,) = check_specs([spec], 1 << 20)
    payload = (
        torch.frombuffer(bytearray(encoded.data), dtype=torch.uint8)
        if encoded.data
        else (torch.empty(0, dtype=torch.uint8))
    )
    return decode_tensor(layout, payload)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.bool).reshape(shape)
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    return torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)


@settings(deadline=None, max_examples=200)
@given(tensors())
def test_codec_any_tensor_comes_back_bit_for_bit(tensor: torch.Tensor) -> None:
    back = round_trip(tensor)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert bits_of(back) == bits_of(tensor)


def test_codec_transposed_tensor_travels_row_major() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).T
    assert bytes(encode_tensor("t", tensor).data) == b"".join(
        value.to_bytes(4, "little") for value in (0, 3, 1, 4, 2, 5)
    )


def test_codec_mask_is_packed_eight_to_a_byte_in_little_bit_order() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert bytes(encode_tensor("mask", mask).data) == bytes([0b00000001, 0b00000011])


def test_codec_bf16_travels_as_its_raw_pattern() -> None:
    assert bytes(encode_tensor("t", torch.tensor([1.0], dtype=torch.bfloat16)).data) == b"\x80\x3f"


def test_encode_contiguous_tensor_exposes_its_own_memory() -> None:
    tensor = torch.zeros(4)
    data = encode_tensor("t", tensor).data
    tensor[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.empty(2).to("meta")]
)
def test_encode_tensor_without_a_place_on_the_wire_raises(tensor: torch.Tensor) -> None:
    with pytest.raises(CodecError, match="'t'"):
        encode_tensor("t", tensor)


def spec(**changes: object) -> pb.TensorSpec:
    values: dict[str, object] = {
        "name": "t",
        "dtype": pb.FLOAT32,
        "shape": [2, 3],
        "codec": pb.RAW,
        "num_bytes": 24,
    }
    return pb.TensorSpec(**{**values, **changes})


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (spec(name=""), "name"),
        (spec(name="x" * 513), "name"),
        (spec(dtype=0), "unknown dtype"),
        (spec(dtype=99), "unknown dtype"),
        (spec(codec=0), "codec"),
        (spec(codec=pb.BITS), "codec"),
        (spec(dtype=pb.BOOL, num_bytes=6), "codec"),
        (spec(num_bytes=23), "takes 24 bytes"),
        (spec(num_bytes=2**64 - 1), "takes 24 bytes"),
        (spec(shape=[2, 2**31], num_bytes=2**34), "dimensions"),
        (spec(shape=[1] * 9, num_bytes=4), "dimensions"),
        # The product overflows 64 bits to the number announced: 2^16 * 2^16 * 2^16 * 2^16 * 4 = 0.
        (spec(shape=[65536] * 4, num_bytes=0), "takes"),
        (spec(shape=[1000, 1000], num_bytes=4_000_000), "may hold 1000000 bytes"),
        (
            spec(dtype=pb.BOOL, codec=pb.BITS, shape=[1_000_001], num_bytes=125_001),
            "may hold 1000000 bytes",
        ),
    ],
)
def test_check_specs_wrong_description_raises(wrong: pb.TensorSpec, match: str) -> None:
    with pytest.raises(CodecError, match=match):
        check_specs([wrong], 1_000_000)


def test_check_specs_same_name_twice_raises() -> None:
    with pytest.raises(CodecError, match="twice"):
        check_specs([spec(), spec()], 1_000_000)


def test_check_specs_limit_is_on_the_sum() -> None:
    assert len(check_specs([spec(), spec(name="u")], 48)) == 2
    with pytest.raises(CodecError, match="may hold 47 bytes"):
        check_specs([spec(), spec(name="u")], 47)
