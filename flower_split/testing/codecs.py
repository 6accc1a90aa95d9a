"""The contract of an activation codec, checked on small seeded tensors and on wrong descriptions."""

import math

import torch
from torch import Tensor

from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.testing.failures import ConformanceError, require, require_refusal
from flower_split.wire.codecs.codec import Codec, Coded, TensorForm
from flower_split.wire.receiving import Incoming
from flower_split.wire.sending import Outgoing

_LIMIT = 1 << 24  # bytes of a message
_SHAPES = ((1, 1, 8), (2, 3, 64), (3, 5, 72))  # [batch, seq, hidden]
_NAME = "hidden_states"


def check_codec(codec: Codec, *, tolerance: float) -> None:
    """Check that a codec keeps the contract of :class:`flower_split.wire.codecs.Codec`.

    A tensor must come back in its own shape and dtype, within the tolerance; the same tensor must
    give the same bits, and nothing that is given may change. Of parts that are not the codec's,
    descriptions alone must be refused.

    Args:
        codec: The codec to check.
        tolerance: The largest error of a value, as a share of the largest magnitude in its tensor;
            0: every bit comes back.

    Raises:
        ConformanceError: It breaks its contract; the first broken clause is named.

    Example:
        >>> from flower_split.testing import check_codec
        >>> from flower_split.wire.codecs import make_codec
        >>> check_codec(make_codec("bfloat16"), tolerance=2**-8)
    """
    subject = f"codec {type(codec).__name__}"
    for number, shape in enumerate(_SHAPES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
            for tensor in (drawn, torch.zeros_like(drawn), drawn.mT.contiguous().mT):
                _check_journey(codec, subject, tensor.to(codec.dtype or dtype), tensor, tolerance)
    _check_refusals(codec, subject)


def _check_journey(
    codec: Codec, subject: str, cast: Tensor, original: Tensor, tolerance: float
) -> None:
    """Check one tensor there and back, through real messages."""
    before = cast.clone()
    tensors = _encoded(codec, subject, cast)
    require(torch.equal(before, cast), subject, "not change the tensor that it is given")
    again = _encoded(codec, subject, before)
    require(
        tensors.keys() == again.keys() and all(_same(tensors[k], again[k]) for k in tensors),
        subject,
        "give the same bits for the same tensor",
    )
    try:
        back = _message(tensors).receive(_LIMIT, coded=Coded(codec, _NAME)).tensors[_NAME]
    except CodecError as error:
        raise ConformanceError(f"{subject} must decode what it encodes: {error}") from error
    require(
        TensorForm.of(back) == TensorForm.of(cast),
        subject,
        f"give a tensor back in its form, {TensorForm.of(cast)}; it is {TensorForm.of(back)}",
    )
    worst = (back.double() - original.double()).abs().max().item()
    allowed = tolerance * original.double().abs().max().item()
    require(
        math.isfinite(worst) and worst <= allowed,
        subject,
        f"keep values within {tolerance:g} of the largest magnitude ({allowed:g}); one of "
        f"{TensorForm.of(original)} is off by {worst:g}",
    )


def _check_refusals(codec: Codec, subject: str) -> None:
    """Check that wrong descriptions are refused from the descriptions alone."""
    tensor = torch.ones(2, 3, 64, dtype=codec.dtype or torch.float32)
    forms = {name: TensorForm.of(part) for name, part in codec.encode(tensor).items()}
    wrong = [
        ("a part that is not its own", {**forms, "unknown-part": TensorForm((1,), torch.uint8)}),
        *(
            (f"parts without {name!r}", {key: forms[key] for key in forms if key != name})
            for name in forms
        ),
    ]
    for what, parts in wrong:
        require_refusal(
            lambda parts=parts: codec.form(parts),  # type: ignore[misc]
            CodecError,
            subject,
            f"refuse {what} in form() with a CodecError",
        )


def _encoded(codec: Codec, subject: str, tensor: Tensor) -> dict[str, Tensor]:
    try:
        return Coded(codec, _NAME).encode(tensor)
    except CodecError as error:
        raise ConformanceError(f"{subject} must encode any activations: {error}") from error


def _message(tensors: dict[str, Tensor]) -> Incoming:
    header = pb.Header(reply=pb.ReplyHeader(version=0))
    return Incoming(Outgoing(header, tensors).frames())


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)
