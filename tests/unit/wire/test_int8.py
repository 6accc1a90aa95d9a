"""Codec int8: its numbers by hand and its error by its bound; a peer's sizes and indices are checked."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_split.errors import CodecError, RefusalReason, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.trunk.service.limits import Limits
from flower_split.wire.codecs import Coded, TensorForm, make_codec
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from tests.support.loopback import (
    FINGERPRINT,
    HIDDEN,
    FakeEngine,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
    served,
)

LIMIT = 1 << 22
CODEC = make_codec("int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # generous: a whole
LEAST = {torch.float32: 2**-126, torch.bfloat16: 2**-126, torch.float16: 2**-24}


def incoming(parts: Mapping[str, Tensor]) -> Incoming:
    header = pb.Header(reply=pb.ReplyHeader(version=1))
    tensors = {f"x/{name}": part for name, part in parts.items()}
    return Incoming(Outgoing(header, tensors).frames())


def journey(tensor: Tensor) -> Tensor:
    """The tensor after a journey in frames."""
    message = incoming(CODEC.encode(tensor))
    return message.receive(LIMIT, coded=Coded(CODEC, "x", TensorForm.of(tensor))).tensors["x"]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_levels_are_those_worked_out_by_hand() -> None:
    # The largest is 127, so the scale is 1; 0.5 and 1.5 go to the even neighbour.
    row = torch.zeros(1, 1, 65)
    row[0, 0, :6] = torch.tensor([127.0, -100.4, 3.5, 0.5, -1.5, -0.0])
    row[0, 0, 64] = 0.25  # a group of one, whose scale is 0.25 / 127, up to the next bfloat16
    # Most channels are 0, as is their median: one channel in 64, begun, may be kept; here two.
    assert CODEC.encode(row)["channels"].tolist() == [0, 1]
    plain = torch.ones(1, 1, 65) * 40  # no channel stands out
    plain[0, 0, :6] = row[0, 0, :6]
    parts = CODEC.encode(plain)
    assert parts["channels"].tolist() == []
    levels = parts["levels"].view(torch.int8)[0, 0]
    assert levels[:6].tolist() == [127, -100, 4, 0, -2, 0] and levels[63] == 40
    scales = parts["scales"][0, 0].tolist()
    assert scales[0] == 1.0
    # 40 / 127 = 0.31496: bfloat16 has 0.314453125 and 0.31640625 beside it.
    assert scales[1] == 0.31640625 and levels[64] == 126  # 40 / 0.31640625 = 126.4
    assert journey(plain)[0, 0, 64] == 126 * 0.31640625


@settings(max_examples=40, deadline=None)
@given(
    positions=st.sampled_from([(1, 1), (2, 3), (7,), (1, 0), ()]),
    hidden=st.sampled_from([1, 5, 63, 64, 65, 130, 192]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-6, 4),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_every_value_comes_back_within_its_bound(
    positions: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    exponent: int,
    outliers: int,
    seed: int,
) -> None:
    tensor = seeded(*positions, hidden, seed=seed) * 10.0**exponent
    tensor[..., :outliers] *= 100
    tensor[..., -1] = 0.0
    tensor = tensor.clamp(-6e4, 6e4).to(dtype)
    parts, back = CODEC.encode(tensor), journey(tensor)
    assert TensorForm.of(back) == TensorForm.of(tensor)
    assert not back[tensor == 0].any()
    kept = parts["channels"].tolist()
    assert len(kept) <= -(-hidden // 64) and kept == sorted(set(kept))
    exact, error = tensor.double(), (back.double() - tensor.double()).abs()
    rounding = HALF_UNIT[dtype] * exact.abs() + LEAST[dtype]
    inside = [channel for channel in range(hidden) if channel not in kept]
    assert (error[..., kept] <= 2**-8 * exact[..., kept].abs() + rounding[..., kept]).all()
    for first in range(0, hidden, 64):
        group = [channel for channel in inside if first <= channel < first + 64]
        if group and tensor.numel():
            largest = exact[..., group].abs().amax(-1, keepdim=True)
            # Half a scale; the scale is up to 2^-7 above a 127th, for bfloat16.
            bound = largest / 127 * (1 + 2**-7) / 2 + 2**-127
            assert (error[..., group] <= bound * 1.02 + rounding[..., group]).all()


def test_outlier_channels_cost_the_others_nothing() -> None:
    plain = seeded(4, 8, 192, seed=3)
    loud = plain.clone()
    loud[..., [5, 70]] *= 1000
    assert CODEC.encode(plain)["channels"].tolist() == []
    assert CODEC.encode(loud)["channels"].tolist() == [5, 70]
    others = [channel for channel in range(192) if channel not in (5, 70)]
    error = (journey(loud) - loud)[..., others].abs().max()
    assert error <= plain.abs().max() / 127 * (1 + 2**-7) / 2
    assert torch.equal(journey(loud)[..., [5, 70]], loud[..., [5, 70]].bfloat16().float())


def test_only_the_largest_outliers_are_kept_and_of_equals_the_first() -> None:
    tensor = torch.ones(2, 1, 128)
    for channel, value in {9: 10.0, 30: 10.0, 31: 10.0, 100: 20.0}.items():
        tensor[1, 0, channel] = value
    assert CODEC.encode(tensor)["channels"].tolist() == [9, 100]  # of 128, two
    tensor[1, 0, [9, 30, 31, 100]] = 6.0  # is not above 6 times the median
    assert CODEC.encode(tensor)["channels"].tolist() == []


def test_the_same_tensor_gives_the_same_bits_however_much_is_done_at_a_time() -> None:
    # 2^18 values are done at a time: all rows take three times, a third of them one.
    tensor = seeded(6000, 128, seed=5)
    whole = CODEC.encode(tensor)
    assert whole["channels"].tolist() == []
    for start in range(0, 6000, 2000):
        part = CODEC.encode(tensor[start : start + 2000])
        for name in ("levels", "scales"):
            assert torch.equal(part[name], whole[name][start : start + 2000])
    digests = {
        incoming(CODEC.encode(tensor)).receive(LIMIT, digest=True, coded=None).digest
        for tensor in (tensor, tensor.clone(), tensor.mT.contiguous().mT)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_of_a_dtype_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.full((1, 2, 128), largest, dtype=dtype)
    tensor[0, 0, 64:] = -largest
    assert (journey(tensor).double() / tensor.double() - 1).abs().max() < 0.008
    tensor = torch.ones(1, 2, 128, dtype=dtype)
    tensor[..., 7] = largest  # is kept apart, and its bfloat16 neighbour may be infinite
    assert journey(tensor)[0, 0, 7].double() / largest == pytest.approx(1, rel=0.005)


def test_the_smallest_numbers_stay_zero_or_small() -> None:
    tensor = torch.full((1, 1, 64), 1e-42)
    assert journey(tensor).abs().max() <= 2**-126


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_arrives_as_nan_over_its_group(dtype: torch.dtype, wrong: float) -> None:
    tensor = torch.ones(2, 2, 128, dtype=dtype)
    tensor[1, 0, 70] = wrong
    back = journey(tensor)
    assert back[1, 0, 64:].isnan().all()
    back[1, 0, 64:] = 1.0
    assert (back - 1).abs().max() < 0.01


def test_a_trunk_refuses_what_is_not_finite_and_names_the_slot() -> None:
    fingerprint = {**FINGERPRINT, "codec": "int8"}
    engine = make_engine(TinyTrunk())
    engine.fingerprint = fingerprint
    hidden = torch.ones(1, 2, HIDDEN)
    with (
        served(engine) as port,
        coordinator(port) as control,
        remote(port, fingerprint=fingerprint) as trunk,
    ):
        control.begin_round(plan(1, evaluate=True))
        trunk.open(0, evaluate=True)
        assert trunk(hidden).isfinite().all()
        hidden[0, 1, 2] = torch.nan
        with pytest.raises(TrunkRefused, match="slot 0: hidden_states") as refused:
            trunk(hidden)
        assert refused.value.reason is RefusalReason.NON_FINITE


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(CodecError, match=r"takes float32.* it got float64 \[1, 2\]"):
        CODEC.encode(torch.ones(1, 2, dtype=torch.float64))


def never(num_bytes: int) -> Tensor:
    raise AssertionError(f"{num_bytes} bytes were allocated before the check")


# Of a tensor [2, 3, 130]: three groups, at most three channels apart.
WRONG_SIZES: Mapping[str, Mapping[str, Tensor]] = {
    "a scale too few": {"scales": torch.zeros(2, 3, 2, dtype=torch.bfloat16)},
    "scales of a row too few": {"scales": torch.zeros(2, 2, 3, dtype=torch.bfloat16)},
    "scales of another dtype": {"scales": torch.zeros(2, 3, 3)},
    "levels of another dtype": {"levels": torch.zeros(2, 3, 130, dtype=torch.int32)},
    "levels without an axis": {"levels": torch.zeros((), dtype=torch.uint8)},
    "channels of two axes": {"channels": torch.zeros(1, 1, dtype=torch.int32)},
    "channels of another dtype": {"channels": torch.zeros(0, dtype=torch.int64)},
    "too many channels": {
        "channels": torch.arange(4, dtype=torch.int32),
        "kept": torch.zeros(2, 3, 4, dtype=torch.bfloat16),
    },
    "a kept value without a channel": {"kept": torch.zeros(2, 3, 1, dtype=torch.bfloat16)},
    "a channel without values": {"channels": torch.zeros(1, dtype=torch.int32)},
    "like of integers": {"like": torch.zeros(0, dtype=torch.int64)},
    "like of a value": {"like": torch.zeros(1)},
    "a part more": {"more": torch.zeros(0)},
}


@pytest.mark.parametrize("what", WRONG_SIZES)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_allocated(what: str) -> None:
    parts = CODEC.encode(seeded(2, 3, 130)) | WRONG_SIZES[what]
    with pytest.raises(CodecError, match="'x' is not of codec Int8Codec"):
        incoming(parts).receive(LIMIT, coded=Coded(CODEC, "x"), allocate=never)


def test_a_decoded_tensor_that_is_too_large_is_refused_before_anything_is_allocated() -> None:
    parts = CODEC.encode(torch.ones(4, 4, 64))  # 1,024 bytes of levels, 4,096 decoded
    with pytest.raises(CodecError, match="decoded, these hold 4096"):
        incoming(parts).receive(2000, coded=Coded(CODEC, "x"), allocate=never)


@pytest.mark.parametrize("channels", [[0, 0], [1, 0], [-1, 0], [5, 130], [2**31 - 1, 5]])
def test_channels_that_are_no_indices_are_refused(channels: list[int]) -> None:
    parts = CODEC.encode(seeded(2, 3, 130))
    parts["channels"] = torch.tensor(channels, dtype=torch.int32)
    parts["kept"] = torch.zeros(2, 3, 2, dtype=torch.bfloat16)
    with pytest.raises(CodecError, match="must ascend from 0 to at most 129"):
        incoming(parts).receive(LIMIT, coded=Coded(CODEC, "x"))


def test_a_peers_infinite_scales_and_values_do_not_become_numbers() -> None:
    parts = CODEC.encode(torch.ones(1, 2, 64))
    parts["scales"][0, 1] = torch.inf
    parts["channels"] = torch.tensor([3], dtype=torch.int32)
    parts["kept"] = torch.full((1, 2, 1), -torch.inf, dtype=torch.bfloat16)
    back = incoming(parts).receive(LIMIT, coded=Coded(CODEC, "x")).tensors["x"]
    assert back[0, 1].isnan().all() and back[0, 0, 3].isnan() and abs(back[0, 0, 4] - 1) < 0.01


def test_activations_and_gradients_travel_by_codecs_of_their_own() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "int8", "gradient-codec": "bfloat16"}
    with served(engine) as port, remote(port, fingerprint=engine.fingerprint) as trunk:
        trunk.open(1)
        hidden = torch.full((1, 2, HIDDEN), 1 + 2**-12, requires_grad=True)
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        ((3 + 2**-12) * output).sum().backward()
    calls = dict(engine.calls)  # of FakeEngine, which doubles what it gets
    forward, grad = calls["forward"][0].tensors["hidden_states"], calls["backward"][0].grad
    # 127 levels of the next bfloat16 above 1.000244 / 127 = 0.0078759: 0.00787353515625 is below.
    assert forward.unique().tolist() == [126 * 0.0079345703125] and forward.dtype == torch.float32
    assert grad.dtype == torch.bfloat16 and grad.float().unique().tolist() == [3.0]
    assert output.dtype == torch.float32 and hidden.grad.unique().tolist() == [6.0]


def test_what_decoding_takes_counts_in_the_share_of_a_client() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "int8"}
    with (
        served(engine, limits=Limits(call_bytes=6000)) as port,
        remote(port, fingerprint=engine.fingerprint) as trunk,
        torch.no_grad(),
    ):
        trunk.open(1)
        trunk(torch.ones(1, 100, HIDDEN))  # 600 levels, 200 bytes of scales, 2,400 decoded
        with pytest.raises(TrunkRefused, match="may hold 6000 bytes"):
            trunk(torch.ones(1, 200, HIDDEN))  # 6,400: the levels alone, 1,200, would fit
    assert engine.count("forward") == 1
