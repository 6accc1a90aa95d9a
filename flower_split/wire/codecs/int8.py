"""Eight bits a value in groups of 64 along the hidden axis, with outlier channels kept in bfloat16.

A value is ``level x scale``: each group of 64 neighbours of one position has a scale of its own, so that
a large value costs the precision of its group alone. A few channels of a transformer are large at every
position (LLM.int8(), https://arxiv.org/abs/2208.07339); they would cost it everywhere, so they travel
apart, which is that paper's idea. Which they are is found in every tensor by itself and needs no
calibration: those whose largest magnitude is above 6 times the median channel's. The paper's threshold
is a magnitude of 6, for activations of about unit size; a multiple of the median holds for gradients of
1e-6 as well, and keeps the error of a channel like the median's under 3 % of its own largest magnitude,
whatever its group holds. At most 1 channel in 64 is kept so, the largest ones, for at most 3 % more bytes.

With ``s`` the group's scale, at most ``1.008 x max / 127``, a value comes back within ``s / 2``, and a
kept channel's within the rounding of bfloat16; then it is rounded to the tensor's own dtype, where that
has 16 bits. Zero stays zero. NaN and Inf come back as NaN, over their group, so that whoever checks
what arrives refuses it as without a codec.

Shapes: a tensor ``[..., hidden]``; positions are all its axes but the last.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from flower_split.errors import CodecError
from flower_split.wire.codecs.codec import Codec, TensorForm
from flower_split.wire.staging import pooled

GROUP = 64  # values of one scale
OUTLIER_RATIO = 6.0  # of a kept channel's largest magnitude to the median channel's
KEPT_SHARE = 64  # one channel in so many may be kept
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LEVELS = 127  # on either side of zero
_SMALLEST = torch.finfo(torch.bfloat16).tiny  # of a scale: also of a group of zeros
_BLOCK = 1 << 18  # values at a time: their float32 copies stay in the processor's cache
_PARTS = {"levels", "scales", "channels", "kept", "like"}


class Int8Codec(Codec):
    """See the module."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return five parts.

        ``levels`` int8, as uint8 of the same bits, [..., hidden]; ``scales`` bfloat16 [..., groups];
        ``channels`` int32 [n], ascending, and their values ``kept`` bfloat16 [..., n]; ``like``, empty
        and of the tensor's dtype.

        Raises:
            CodecError: It is not of float32, bfloat16 or float16, or has no axis.
        """
        if tensor.dtype not in DTYPES or tensor.ndim == 0:
            raise CodecError(
                "trunk.wire-dtype int8 takes float32, bfloat16 and float16 of one axis or more; it got "
                f"{TensorForm.of(tensor)}. Choose another codec, or another model.dtype."
            )
        *positions, hidden = tensor.shape
        rows = tensor.reshape(-1, hidden) if tensor.numel() else tensor.new_empty(0, hidden)
        largest = _largest_of_channels(rows)
        finite = bool(largest.isfinite().all())
        channels = _outliers(largest) if finite else torch.empty(0, dtype=torch.int64)
        levels = pooled(rows.numel()).view(torch.int8).view(rows.shape)
        scales = torch.empty(len(rows), _groups(hidden), dtype=torch.bfloat16)
        for start, block in _blocks(rows):
            stop = start + len(block)
            block.index_fill_(1, channels, 0.0)
            _quantise(block, scales[start:stop], finite=finite)
            levels[start:stop] = block[:, :hidden]
        limit = torch.finfo(torch.bfloat16).max  # float32 has a little more
        kept = rows[:, channels].float().clamp(-limit, limit).to(torch.bfloat16)
        return {
            "levels": levels.view(torch.uint8).view(tensor.shape),
            "scales": scales.view(*positions, _groups(hidden)),
            "channels": channels.to(torch.int32),
            "kept": kept.view(*positions, len(channels)),
            "like": tensor.new_empty(0),
        }

    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of ``levels``, of the dtype of ``like``; every size is checked."""
        if parts.keys() != _PARTS:
            raise CodecError(f"the parts are {sorted(_PARTS)}; there are {sorted(parts)}.")
        levels, like = parts["levels"], parts["like"]
        if not levels.shape or levels.dtype != torch.uint8:
            raise CodecError(f"levels are uint8 of one axis or more; they are {levels}.")
        *positions, hidden = levels.shape
        num_kept = parts["channels"].shape[0] if len(parts["channels"].shape) == 1 else -1
        if not 0 <= num_kept <= _most_kept(hidden):
            raise CodecError(
                f"channels is a list of at most {_most_kept(hidden)} for a width of {hidden}; it is "
                f"{parts['channels']}."
            )
        wanted = {
            "scales": TensorForm((*positions, _groups(hidden)), torch.bfloat16),
            "channels": TensorForm((num_kept,), torch.int32),
            "kept": TensorForm((*positions, num_kept), torch.bfloat16),
            "like": TensorForm((0,), like.dtype if like.dtype in DTYPES else torch.float32),
        }
        for name, form in wanted.items():
            if parts[name] != form:
                raise CodecError(
                    f"beside levels of {levels}, {name} is {form}; it is {parts[name]}."
                )
        return TensorForm(levels.shape, like.dtype)

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return levels times scales, and the kept channels.

        Raises:
            CodecError: The channels are not ascending, or not of the tensor.
        """
        levels, dtype = parts["levels"].view(torch.int8), parts["like"].dtype
        hidden = levels.shape[-1]
        channels = parts["channels"].to(torch.int64)
        _check_channels(channels, hidden)
        result = pooled(levels.numel() * dtype.itemsize).view(dtype).view(levels.shape)
        if not levels.numel():
            return result
        rows, flat = levels.view(-1, hidden), result.view(-1, hidden)
        scales = _finite_or_nan(parts["scales"].float().view(len(rows), -1))
        limit = torch.finfo(dtype).max
        # A level rounded up, times its scale, may lie beyond a dtype that ends at the largest value.
        beyond = not scales.abs().amax() * (_LEVELS + 1) <= limit
        for start, block in _blocks(rows):
            stop = start + len(block)
            block.view(len(block), -1, GROUP).mul_(scales[start:stop].unsqueeze(-1))
            if beyond:
                block.clamp_(-limit, limit)
            flat[start:stop] = block[:, :hidden]
        if len(channels):
            kept = _finite_or_nan(parts["kept"].float().view(len(rows), -1))
            flat.index_copy_(1, channels, kept.clamp_(-limit, limit).to(dtype))
        return result


def _groups(hidden: int) -> int:
    return -(-hidden // GROUP)


def _most_kept(hidden: int) -> int:
    return -(-hidden // KEPT_SHARE)


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield float32 copies of a few rows each, padded with zeros to whole groups, and where they begin.

    The memory is one block's: a copy is good until the next one is asked for.
    """
    count, hidden = rows.shape
    width = _groups(hidden) * GROUP
    step = max(1, _BLOCK // max(1, width))
    memory = torch.zeros(min(step, count), width)
    for start in range(0, count, step):
        taken = rows[start : start + step]
        block = memory[: len(taken)]
        block[:, :hidden] = taken
        block[:, hidden:] = 0.0
        yield start, block


def _largest_of_channels(rows: Tensor) -> Tensor:
    """Return the largest magnitude of every channel, float32 [hidden]; NaN where one holds NaN."""
    hidden = rows.shape[1]
    largest = torch.zeros(hidden)
    for _, block in _blocks(rows):
        torch.maximum(largest, block.abs_()[:, :hidden].amax(0), out=largest)
    return largest


def _outliers(largest: Tensor) -> Tensor:
    """Return the channels that are kept, int64, ascending."""
    if not len(largest):
        return torch.empty(0, dtype=torch.int64)
    above = int((largest > OUTLIER_RATIO * largest.median()).sum())
    # Stable: which of two equal channels is kept may not depend on the machine.
    order = largest.argsort(descending=True, stable=True)
    return order[: min(above, _most_kept(len(largest)))].sort().values


def _quantise(block: Tensor, scales: Tensor, *, finite: bool) -> None:
    """Replace values by their levels, and fill in their scales.

    Args:
        block: float32 [positions, groups x 64].
        scales: bfloat16 [positions, groups].
        finite: Whether every value is.
    """
    groups = block.view(len(block), -1, GROUP)
    exact = groups.abs().amax(-1).div_(_LEVELS).clamp_(min=_SMALLEST)
    if not finite:
        exact = _finite_or_nan(exact)
    # Up to the next bfloat16, by its bits: no level is then beyond 127.
    rounded = exact.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    scales.copy_(rounded)
    groups.div_(rounded.unsqueeze(-1)).round_()  # ties to even
    if not finite:
        groups.nan_to_num_(0.0)


def _finite_or_nan(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def _check_channels(channels: Tensor, hidden: int) -> None:
    """Refuse channels that :func:`_outliers` never gives; they are used as indices."""
    bounded = functional.pad(channels, (1, 1), value=-1)
    bounded[-1] = hidden
    if not bool((bounded.diff() > 0).all()):
        raise CodecError(f"the channels must ascend from 0 to at most {hidden - 1}; they do not.")
