"""Activation codecs: what is announced is checked before it is received; both ends use one codec."""

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from flower_split.config import parse_run_config
from flower_split.errors import CodecError, ConfigError, TrunkRefused
from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.codecs import CODECS, Codec, Coded, TensorForm, WireCodecs, make_codec
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from tests.support.loopback import FINGERPRINT, HIDDEN, FakeEngine, remote, served

LIMIT = 1 << 20
NAME = f"{__name__}:HalvesCodec"


class HalvesCodec(Codec):
    """The first half of each row in float16, the rest as bytes of no meaning: eight to a value.

    A sparse codec in small: the width travels as the shape of an empty part.
    """

    dtype: ClassVar[torch.dtype | None] = torch.float32

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        half = tensor.shape[-1] // 2
        return {
            "kept": tensor[..., :half].to(torch.float16),
            "width": torch.empty(tensor.shape[-1], 0, dtype=torch.uint8),
        }

    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        if parts.keys() != {"kept", "width"}:
            raise CodecError(f"there are the parts {sorted(parts)}.")
        return TensorForm((*parts["kept"].shape[:-1], parts["width"].shape[0]), torch.float32)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        kept = parts["kept"].float()
        missing = parts["width"].shape[0] - kept.shape[-1]
        return torch.cat([kept, torch.zeros(*kept.shape[:-1], missing)], dim=-1)


def incoming(tensors: Mapping[str, Tensor]) -> Incoming:
    header = pb.Header(reply=pb.ReplyHeader(version=1))
    return Incoming(Outgoing(header, tensors).frames())


def never(num_bytes: int) -> Tensor:
    raise AssertionError(f"{num_bytes} bytes were allocated before the check")


@pytest.mark.parametrize(
    ("name", "sent", "back"),
    [
        # 1 + 2^-8 lies between the bfloat16 neighbours 1 and 1 + 2^-7: to even, 1
        ("native", [1 + 2**-8, -0.0], [1 + 2**-8, -0.0]),
        ("float32", [1 + 2**-8, -0.0], [1 + 2**-8, -0.0]),
        ("bfloat16", [1 + 2**-8, 3.0], [1.0, 3.0]),
    ],
)
def test_built_in_codecs_travel_in_one_part_of_their_dtype(
    name: str, sent: list[float], back: list[float]
) -> None:
    codec = make_codec(name)
    tensor = torch.tensor([[sent]])
    cast = tensor.to(codec.dtype or tensor.dtype)
    tensors = Coded(codec, "x").encode(cast)
    assert list(tensors) == ["x"] and tensors["x"].dtype == cast.dtype
    received = incoming(tensors).receive(LIMIT, coded=Coded(codec, "x", TensorForm.of(cast)))
    assert torch.equal(received.tensors["x"].float(), torch.tensor([[back]]))


def test_a_codec_of_several_parts_meets_no_other_tensor_of_the_message() -> None:
    tensor = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])
    others = {"xy": torch.ones(2), "attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    tensors = {**Coded(HalvesCodec(), "x").encode(tensor), **others}
    assert set(tensors) == {"x/kept", "x/width", "xy", "attention_mask"}
    back = incoming(tensors).receive(LIMIT, coded=Coded(HalvesCodec(), "x")).tensors
    assert back.keys() == {"x", *others}
    assert torch.equal(back["x"], torch.tensor([[[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]]))


def test_the_digest_is_over_what_travels() -> None:
    tensor = torch.arange(6.0).reshape(1, 1, 6)
    tensors = Coded(HalvesCodec(), "x").encode(tensor)
    plain = incoming(tensors).receive(LIMIT, digest=True).digest
    coded = incoming(tensors).receive(LIMIT, coded=Coded(HalvesCodec(), "x"), digest=True).digest
    assert coded == plain and len(coded) == 16


def test_a_small_message_that_decodes_to_a_huge_tensor_is_refused_before_it_is_received() -> None:
    bomb = {
        "x/kept": torch.ones(1, 1, 3, dtype=torch.float16),
        "x/width": torch.empty(1 << 30, 0, dtype=torch.uint8),
    }
    with pytest.raises(CodecError, match="decoded, these hold 4294967296"):
        incoming(bomb).receive(LIMIT, coded=Coded(HalvesCodec(), "x"), allocate=never)


@pytest.mark.parametrize(
    ("codec", "tensors", "words"),
    [
        (HalvesCodec(), {"x/kept": torch.ones(1, 1, 3)}, r"not of codec HalvesCodec: .*\['kept'\]"),
        (make_codec("native"), {"x": torch.ones(2), "x/more": torch.ones(1)}, "one part"),
        (
            make_codec("bfloat16"),
            {"x": torch.ones(2)},
            r"must be torch.bfloat16; it is float32 \[2",
        ),
    ],
)
def test_parts_of_another_codec_are_refused_before_they_are_received(
    codec: Codec, tensors: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(CodecError, match=words):
        incoming(tensors).receive(LIMIT, coded=Coded(codec, "x"), allocate=never)


def test_another_form_than_expected_is_refused_before_it_is_received() -> None:
    like = TensorForm((1, 1, 4), torch.float32)
    with pytest.raises(
        CodecError, match=r"'x' must be float32 \[1, 1, 4\]; .* float32 \[1, 1, 6\]"
    ):
        incoming({"x": torch.ones(1, 1, 6)}).receive(
            LIMIT, coded=Coded(make_codec("native"), "x", like), allocate=never
        )
    with pytest.raises(CodecError, match=r"'x' of float32 .* must come; there are \['y'\]"):
        incoming({"y": torch.ones(1)}).receive(LIMIT, coded=Coded(make_codec("native"), "x", like))


class Fails(HalvesCodec):
    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        raise ValueError("no room")

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        raise IndexError("nothing there")


def test_what_a_plug_in_raises_names_it_and_the_tensor() -> None:
    tensor = torch.ones(1, 2, 6)
    with pytest.raises(CodecError, match=r"codec Fails cannot encode 'x' \(float32 \[1, 2, 6\]\)"):
        Coded(Fails(), "x").encode(tensor)
    message = incoming(Coded(HalvesCodec(), "x").encode(tensor))
    with pytest.raises(CodecError, match="cannot decode 'x'.*IndexError: nothing there"):
        message.receive(LIMIT, coded=Coded(Fails(), "x"))


def test_a_name_is_checked_by_form_in_the_config_and_by_the_registry_when_it_is_used() -> None:
    assert parse_run_config({"trunk.wire-dtype": "of-a-plug-in"}).trunk.wire_dtype == "of-a-plug-in"
    for wrong in ("", "two words", "module:", "a,b"):
        with pytest.raises(ConfigError, match="trunk.wire-dtype must be a name"):
            parse_run_config({"trunk.wire-dtype": wrong})
    config = parse_run_config({"trunk.gradient-wire-dtype": "int8"}).trunk
    assert (config.wire_dtype, config.gradient_wire_dtype) == ("native", "int8")
    with pytest.raises(ConfigError, match="trunk.gradient-wire-dtype must be a name"):
        parse_run_config({"trunk.gradient-wire-dtype": "two words"})
    with pytest.raises(ConfigError, match="trunk.gradient-wire-dtype 'int9' is unknown.*'int8'"):
        WireCodecs.make("native", "int9")
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        make_codec("bfloat61")
    with pytest.raises(ConfigError, match="cannot be made without arguments.*abstract"):
        make_codec("flower_split.wire.codecs:Codec")
    assert CODECS.names()[:4] == ["native", "float32", "bfloat16", "int8"]


def test_both_ends_use_the_codec_that_the_fingerprint_names_in_both_directions() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": NAME}
    with served(engine) as port, remote(port, fingerprint=engine.fingerprint) as trunk:
        trunk.open(1)
        hidden = torch.full((1, 2, HIDDEN), 1 + 2**-12, requires_grad=True)  # in float16: 1
        with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
            output = trunk(hidden)
        (3 * output).sum().backward()
    half = HIDDEN // 2
    one, none = torch.ones(1, 2, half), torch.zeros(1, 2, half)
    calls = dict(engine.calls)  # of FakeEngine, which doubles what it gets
    forward = calls["forward"][0].tensors["hidden_states"]
    assert torch.equal(forward, torch.cat([one, none], dim=-1))
    assert torch.equal(output, torch.cat([2 * one, none], dim=-1))
    assert torch.equal(calls["backward"][0].grad, torch.cat([3 * one, none], dim=-1))
    assert torch.equal(hidden.grad, torch.cat([6 * one, none], dim=-1))
    assert trunk.stats.gradient_bytes_sent < hidden.nbytes + 200


def test_a_trunk_with_a_codec_that_is_not_there_does_not_start() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "missing"}
    with pytest.raises(ConfigError, match="trunk.wire-dtype 'missing' is unknown"), served(engine):
        pass


def test_parts_that_are_not_the_trunks_codec_are_refused_by_the_trunk() -> None:
    engine = FakeEngine()
    engine.fingerprint = {**FINGERPRINT, "codec": "bfloat16"}
    with served(engine) as port, remote(port, fingerprint=FINGERPRINT) as trunk:
        trunk.open(1)  # the fake engine checks no fingerprint
        with torch.no_grad(), pytest.raises(TrunkRefused, match="not of codec BFloat16Codec"):
            trunk(torch.ones(1, 2, HIDDEN))
    assert engine.count("forward") == 0
