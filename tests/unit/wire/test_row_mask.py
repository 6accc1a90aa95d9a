"""Gradients travel without their rows of zeros: bit for bit, by agreement, and as the mask says."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol import convert
from flower_split.trunk.service.limits import Limits
from flower_split.wire.codecs import Coded, TensorForm, make_codec
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing
from tests.support.loopback import FINGERPRINT, HIDDEN, FakeEngine, remote, served

LIMIT = 1 << 20
CODED = Coded(make_codec("native"), "g", without_zeros=True)


def incoming(tensors: Mapping[str, Tensor]) -> Incoming:
    header = pb.Header(reply=pb.ReplyHeader(version=1))
    return Incoming(Outgoing(header, tensors).frames())


def never(num_bytes: int) -> Tensor:
    raise AssertionError(f"{num_bytes} bytes were allocated before the check")


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 5),
    hidden=st.sampled_from([1, 4, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    data=st.data(),
)
def test_every_bit_comes_back(
    batch: int, seq: int, hidden: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    values = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -2.5, float("nan"), float("inf")])
    drawn = data.draw(
        st.lists(values, min_size=batch * seq * hidden, max_size=batch * seq * hidden)
    )
    tensor = torch.tensor(drawn, dtype=dtype).view(batch, seq, hidden)
    like = TensorForm.of(tensor)
    parts = CODED.encode(tensor)
    back = incoming(parts).receive(LIMIT, coded=Coded(CODED.codec, "g", like, True)).tensors
    assert back.keys() == {"g"}
    assert torch.equal(back["g"].view(torch.uint8), tensor.view(torch.uint8))
    zero = (tensor.view(torch.uint8).view(batch, seq, -1) == 0).all(-1)
    if zero.any() and not zero.all():
        assert parts["g"].shape == (1, int((~zero).sum()), hidden)
        assert torch.equal(parts["g.rows"].squeeze(-1), ~zero)


def test_only_rows_whose_bits_are_all_zero_stay_behind() -> None:
    tensor = torch.zeros(2, 3, 4)
    tensor[0, 0] = 1.0
    tensor[0, 1, 3] = 5.0  # its first number is zero
    tensor[1, 2, 0] = -0.0
    parts = CODED.encode(tensor)
    assert parts["g.rows"][..., 0].tolist() == [[True, True, False], [False, False, True]]
    assert parts["g"].tolist() == [[[1.0] * 4, [0.0, 0.0, 0.0, 5.0], [-0.0, 0.0, 0.0, 0.0]]]
    assert CODED.encode(torch.ones(2, 3, 4)).keys() == {"g"}  # a dense one travels as ever
    assert CODED.encode(torch.zeros(2, 3, 4))["g"].shape == (1, 1, 4)  # one row, for codecs' sake
    assert Coded(CODED.codec, "g").encode(tensor).keys() == {"g"}


def test_every_codec_takes_the_rows_alone() -> None:
    tensor = torch.linspace(-1, 1, 2 * 4 * 130).view(2, 4, 130)
    tensor[1, 1:] = 0.0
    for name in ("float32", "bfloat16", "int8"):
        codec = make_codec(name)
        cast = tensor.to(codec.dtype or torch.float32)
        coded = Coded(codec, "g", TensorForm.of(cast), without_zeros=True)
        back = incoming(coded.encode(cast)).receive(LIMIT, coded=coded).tensors["g"]
        dense = incoming(Coded(codec, "g").encode(cast)).receive(LIMIT, coded=Coded(codec, "g"))
        assert torch.equal(back, dense.tensors["g"])


MASK = torch.tensor([[[True], [False]], [[True], [True]]])


@pytest.mark.parametrize(
    ("rows", "mask", "words"),
    [
        (torch.ones(1, 5, 4), MASK, "of at least so many"),
        (torch.ones(2, 1, 4), MASK, "rows .1, rows, hidden."),
        (torch.ones(3, 4), MASK, "rows .1, rows, hidden."),
        (torch.ones(1, 3, 4), MASK.to(torch.uint8), "a mask of booleans"),
        (torch.ones(1, 3, 4), MASK[..., 0], "batch, seq, 1"),
        (torch.ones(1, 3, 4), MASK.expand(2, 2, 2), "batch, seq, 1"),
        (torch.ones(1, 1, 4), torch.ones(512, 512, 1, dtype=torch.bool), "decoded, these hold"),
    ],
)
def test_rows_and_masks_that_cannot_be_are_refused_before_anything_is_allocated(
    rows: Tensor, mask: Tensor, words: str
) -> None:
    with pytest.raises(CodecError, match=words):
        incoming({"g": rows, "g.rows": mask}).receive(LIMIT, coded=CODED, allocate=never)


def test_a_mask_that_names_another_number_of_rows_is_refused() -> None:
    with pytest.raises(CodecError, match="the mask names 3 rows, and 2 came"):
        incoming({"g": torch.ones(1, 2, 4), "g.rows": MASK}).receive(LIMIT, coded=CODED)


def test_a_mask_where_none_was_agreed_is_refused_as_is_one_of_another_shape() -> None:
    parts = {"g": torch.ones(1, 3, 4), "g.rows": MASK}
    with pytest.raises(CodecError, match="travels with all of its rows"):
        incoming(parts).receive(LIMIT, coded=Coded(CODED.codec, "g"), allocate=never)
    like = TensorForm((2, 3, 4), torch.float32)
    with pytest.raises(CodecError, match="must be float32 .2, 3, 4.; it is announced as .*2, 2, 4"):
        incoming(parts).receive(LIMIT, coded=Coded(CODED.codec, "g", like, True), allocate=never)
    with pytest.raises(CodecError, match="must come"):
        incoming({"g.rows": MASK}).receive(LIMIT, coded=Coded(CODED.codec, "g", like, True))


def backward(trunk: object) -> tuple[Tensor, Tensor]:
    """The gradient that a client gets for one with rows of zeros, and that one."""
    hidden = torch.ones(2, 50, HIDDEN, requires_grad=True)
    grad = torch.zeros(2, 50, HIDDEN)
    grad[0, 0], grad[1, 1] = 1.5, -2.0
    with trunk.micro_batch(0, 0, num_tokens=1, loss_denominator=1.0, last=True):
        output = trunk(hidden)
    output.backward(grad)
    return hidden.grad, grad


def test_a_clients_gradients_travel_without_their_rows_of_zeros_both_ways() -> None:
    engine = FakeEngine()  # which doubles what it gets
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        smashed_grad, grad = backward(trunk)
        stats = trunk.stats
    assert torch.equal(smashed_grad, 2 * grad)
    call = next(arguments[0] for method, arguments in engine.calls if method == "backward")
    assert torch.equal(call.grad, grad)
    # Two rows of 24 bytes and a mask of 13 of the 2,400 bytes.
    assert stats.gradient_bytes_sent < 300 and stats.gradient_bytes_received < 300
    assert stats.bytes_sent - stats.gradient_bytes_sent > 2400


def test_a_trunk_of_an_earlier_version_gets_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    as_now = convert.grant_to_proto

    def as_before(*arguments: object) -> pb.OpenSessionReply:
        reply = as_now(*arguments)
        reply.ClearField("without_zeros")
        return reply

    monkeypatch.setattr("flower_split.trunk.service.client_sessions.grant_to_proto", as_before)
    engine = FakeEngine()
    with served(engine) as port, remote(port) as trunk:
        trunk.open(1)
        smashed_grad, grad = backward(trunk)
        stats = trunk.stats
    assert torch.equal(smashed_grad, 2 * grad)
    assert min(stats.gradient_bytes_sent, stats.gradient_bytes_received) > 2400


def test_the_whole_tensor_counts_in_the_share_of_a_client() -> None:
    engine = FakeEngine()
    with (
        served(engine, limits=Limits(call_bytes=2420)) as port,
        remote(port, fingerprint=FINGERPRINT) as trunk,
    ):
        trunk.open(1)
        # A forward's 2,400 bytes have a place; the rows, their mask and the whole do not.
        with pytest.raises(Exception, match="may hold 2420 bytes"):
            backward(trunk)
    assert engine.count("backward") == 0
