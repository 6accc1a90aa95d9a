"""What an activation codec is, those that cast, and the one tensor of a message that goes through one.

Four kinds of tensor pass through one: smashed data, ``trunk_output`` and their gradients, all
``[batch, seq, hidden]``. Masks, position ids and what else goes with a forward travel as they are.

Gradients may leave their rows of zeros at home. The gradient of a padded position is zero, whatever the
model, unless something reads the position; so is that of a sequence's last one in causal language
modelling. A row stays behind where each of its bits is 0, and comes back as it was: beside
``[1, rows, hidden]`` travels a mask, ``[batch, seq, 1]``. No mask of the model is asked. Hidden states at
padded positions do travel: whether they matter is the model's to say (routers of experts, convolutions,
pooling, layers quantised by whole columns), and the wire cannot see it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.errors import CodecError

_WHOLE = ""  # the name of the one part
_SEPARATOR = "/"
_ROWS = ".rows"  # ends the name of the mask that says where rows belong
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor before its bytes are there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of such a tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Codec(ABC):
    """How activations travel; register one in the entry-point group ``flower_split.codecs``.

    An instance is made without arguments for each session of a client, and one for the trunk, which
    uses it from several threads at once: keep no state. The same tensor must always give the same
    bits: a call that is sent again is recognised by a digest of what travels.
    """

    dtype: ClassVar[torch.dtype | None] = None
    """What a tensor is cast to before it is encoded, on the device it is on; None: its own dtype."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return what travels, by the name of each part.

        Args:
            tensor: On the CPU, of :attr:`dtype` if that is set; never changed.

        Returns:
            Dense CPU tensors of the wire's dtypes (float64, float32, bfloat16, float16, int64, int32,
            uint8, bool). Sizes that no part tells can travel as the shape of an empty one: it takes no
            payload, and :meth:`form` sees it before anything is allocated.
        """

    @abstractmethod
    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of the tensor that ``parts`` decode to: that which was encoded.

        It is called before memory is allocated for the payload, with what the sender announces.

        Raises:
            CodecError: The parts are not what :meth:`encode` gives for any tensor.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor, of the form that :meth:`form` gave.

        Args:
            parts: As they arrived, each over writable memory of its own; may be given back.

        Raises:
            CodecError: A value is one that :meth:`encode` never gives.
        """


class NativeCodec(Codec):
    """Send a tensor as it is, bit for bit."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensor itself."""
        return {_WHOLE: tensor}

    def form(self, parts: Mapping[str, TensorForm]) -> TensorForm:
        """Return the form of the one part."""
        if parts.keys() != {_WHOLE}:
            raise CodecError(f"one part without a name is sent; there are {sorted(parts)}.")
        form = parts[_WHOLE]
        if self.dtype is not None and form.dtype != self.dtype:
            raise CodecError(f"the part must be {self.dtype}; it is {form}.")
        return form

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the one part."""
        return parts[_WHOLE]


class Float32Codec(NativeCodec):
    """Cast to float32 for the journey."""

    dtype: ClassVar[torch.dtype | None] = torch.float32


class BFloat16Codec(NativeCodec):
    """Cast to bfloat16 for the journey, rounding to the nearest, ties to even."""

    dtype: ClassVar[torch.dtype | None] = torch.bfloat16


def stays_on_device(codec: Codec) -> bool:
    """Return whether what a codec encodes and decodes is the tensor itself, wherever it lies.

    A plug-in's subclass of these may do anything, and is told CPU tensors.
    """
    return type(codec) in (NativeCodec, Float32Codec, BFloat16Codec)


@dataclass(frozen=True, slots=True)
class Coded:
    """The tensor of a message that goes through a codec, checked on both sides.

    What the codec raises, a plug-in's own errors included, becomes a CodecError that names the
    tensor and the codec.

    Args:
        codec: What its sender encodes with.
        name: The tensor's name. What travels for it is named ``name`` and ``name/part``.
        like: The form that it must have when it arrives; None: any, or none may come.
        without_zeros: Whether it may travel without its rows of zeros (see the module).
    """

    codec: Codec
    name: str
    like: TensorForm | None = None
    without_zeros: bool = False

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors that travel for ``tensor``, by name.

        Raises:
            CodecError: The codec fails.
        """
        tensor, mask = tensor.detach(), None
        if self.without_zeros:
            mask = _rows_to_send(tensor)
            tensor = tensor if mask is None else tensor[mask.squeeze(-1)].unsqueeze(0)
        try:
            parts = self.codec.encode(tensor)
        except CodecError:
            raise
        except Exception as error:  # a plug-in may raise anything
            what = f"encode {self.name!r} ({TensorForm.of(tensor)})"
            raise self._failed(what, error) from error
        named = {
            f"{self.name}{_SEPARATOR}{part}" if part else self.name: value
            for part, value in parts.items()
        }
        return named if mask is None else {**named, self._mask: mask}

    def form(
        self,
        announced: Mapping[str, TensorForm],
        max_bytes: int,
        admit: Callable[[int], None] | None = None,
    ) -> TensorForm | None:
        """Return the form of what is announced, once decoded; None where the tensor does not come.

        Args:
            announced: All tensors of the message; the others count towards the limit.
            max_bytes: Limit on all tensors as they are decoded.
            admit: Told the bytes that decoding takes beside what travels, if any; may refuse them.

        Raises:
            CodecError: The parts are not the codec's, are too large once decoded, or decode to
                another form than ``like``.
        """
        mine = {self._part(key): form for key, form in announced.items() if self._is_part(key)}
        if not mine:
            if self.like is not None:
                raise CodecError(
                    f"{self.name!r} of {self.like} must come; there are {sorted(announced)}."
                )
            return None
        try:
            form = self.codec.form(mine)
        except CodecError as error:
            raise self._foreign(error) from error
        except Exception as error:  # a plug-in may raise anything
            forms = ", ".join(f"{part!r}: {form}" for part, form in mine.items())
            what = f"read the descriptions of {self.name!r} ({forms})"
            raise self._failed(what, error) from error
        if self._mask in announced:
            form = self._whole(form, announced[self._mask])
        if self.like is not None and form != self.like:
            raise CodecError(f"{self.name!r} must be {self.like}; it is announced as {form}.")
        rest = sum(form.num_bytes for key, form in announced.items() if not self._is_part(key))
        if form.num_bytes + rest > max_bytes:
            raise CodecError(
                f"the tensors of one message may hold {max_bytes} bytes; decoded, these hold "
                f"{form.num_bytes + rest}. Send smaller micro-batches (train.batch-size, "
                "train.sequence-length)."
            )
        if admit is not None and (self._mask in announced or not stays_on_device(self.codec)):
            admit(form.num_bytes)
        return form

    def decode(self, arrived: Mapping[str, Tensor], form: TensorForm) -> dict[str, Tensor]:
        """Return the tensors of a message with this one decoded, which comes first.

        Args:
            arrived: As they came.
            form: The one that :meth:`form` gave.

        Raises:
            CodecError: The codec fails, or gives another form.
        """
        mine = {self._part(key): value for key, value in arrived.items() if self._is_part(key)}
        try:
            tensor = self.codec.decode(mine)
        except CodecError as error:
            raise self._foreign(error) from error
        except Exception as error:  # a plug-in may raise anything
            raise self._failed(f"decode {self.name!r} ({form})", error) from error
        if self._mask in arrived:
            tensor = _scattered(tensor, arrived[self._mask])
        if (tuple(tensor.shape), tensor.dtype) != (form.shape, form.dtype):
            raise CodecError(
                f"codec {type(self.codec).__name__} decodes {self.name!r} to "
                f"{TensorForm.of(tensor)}, and has announced {form}. Correct the plug-in."
            )
        others = {
            key: value
            for key, value in arrived.items()
            if not self._is_part(key) and key != self._mask
        }
        return {self.name: tensor, **others}

    @property
    def _mask(self) -> str:
        return self.name + _ROWS

    def _whole(self, form: TensorForm, mask: TensorForm) -> TensorForm:
        if not self.without_zeros:
            raise CodecError(f"{self.name!r} travels with all of its rows; {self._mask!r} came.")
        try:
            return _whole_form(form, mask)
        except CodecError as error:
            raise CodecError(f"{self.name!r}: {error}") from error

    def _is_part(self, key: str) -> bool:
        return key == self.name or key.startswith(self.name + _SEPARATOR)

    def _part(self, key: str) -> str:
        return key.removeprefix(self.name).removeprefix(_SEPARATOR)

    def _foreign(self, error: CodecError) -> CodecError:
        return CodecError(f"{self.name!r} is not of codec {type(self.codec).__name__}: {error}")

    def _failed(self, what: str, error: Exception) -> CodecError:
        return CodecError(
            f"codec {type(self.codec).__name__} cannot {what}: {type(error).__name__}: {error}. "
            "Correct the plug-in, or choose another trunk.wire-dtype."
        )


def _rows_to_send(tensor: Tensor) -> Tensor | None:
    """Return the mask of the rows of ``tensor`` that are not all +0; None: every row must travel.

    A dense tensor costs one look at the first number of every row.
    """
    if tensor.device.type != "cpu" or tensor.ndim != 3 or not tensor.numel():
        return None
    bits = tensor.contiguous().view(_BITS[tensor.element_size()])
    mask = bits[..., 0] != 0
    if bool(mask.all()):
        return None
    unsure = ~mask
    mask[unsure] = (bits[unsure] != 0).any(-1)
    if not bool(mask.any()):
        mask[0, 0] = True  # codecs need not know tensors without a number
    return None if bool(mask.all()) else mask.unsqueeze(-1)


def _whole_form(rows: TensorForm, mask: TensorForm) -> TensorForm:
    """Return the form of the tensor that rows and their mask make.

    Raises:
        CodecError: They cannot belong together.
    """
    if (
        mask.dtype != torch.bool
        or len(mask.shape) != 3
        or mask.shape[2] != 1
        or len(rows.shape) != 3
        or rows.shape[0] != 1
        or rows.shape[1] > math.prod(mask.shape)
    ):
        raise CodecError(
            "rows [1, rows, hidden] come with a mask of booleans, [batch, seq, 1], of at least so many; "
            f"they are {rows} with {mask}."
        )
    return TensorForm((*mask.shape[:2], rows.shape[2]), rows.dtype)


def _scattered(rows: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor that ``rows`` were taken from, with zeros where none was.

    Raises:
        CodecError: The mask names another number of rows.
    """
    named = int(mask.sum())
    if named != rows.shape[1]:
        raise CodecError(f"the mask names {named} rows, and {rows.shape[1]} came.")
    whole = torch.zeros(*mask.shape[:2], rows.shape[2], dtype=rows.dtype)
    whole[mask.squeeze(-1)] = rows[0]
    return whole
