"""The one tensor of a message that goes through a codec: encoded, checked, decoded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.codecs import row_mask
from flower_split.wire.codecs.codec import Codec, TensorForm, stays_on_device

_SEPARATOR = "/"


@dataclass(frozen=True, slots=True)
class Coded:
    """The tensor of a message that goes through a codec, checked on both sides.

    What the codec raises, a plug-in's own errors included, becomes a CodecError that names the
    tensor and the codec.

    Args:
        codec: What its sender encodes with.
        name: Of the tensor. What travels for it is named ``name`` and ``name/part``.
        like: The form that it must have when it arrives; None: any, or none may come.
        without_zeros: Whether it may travel without its rows of zeros (:mod:`.row_mask`).
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
            mask = row_mask.rows_to_send(tensor)
            tensor = tensor if mask is None else row_mask.gathered(tensor, mask)
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

    def travels_whole(self, names: Iterable[str]) -> bool:
        """Return whether the tensor itself is what travels, so that decoding takes no more memory.

        Args:
            names: Of the tensors of its message.
        """
        return stays_on_device(self.codec) and self._mask not in names

    def form(self, announced: Mapping[str, TensorForm], max_bytes: int) -> TensorForm | None:
        """Return the form of what is announced, once decoded; None where the tensor does not come.

        Args:
            announced: All tensors of the message; the others count towards the limit.
            max_bytes: Limit on all tensors as they are decoded.

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
        return form

    def decode(self, arrived: Mapping[str, Tensor], form: TensorForm) -> dict[str, Tensor]:
        """Return the tensors of a message with this one decoded, which comes first.

        Args:
            arrived: As they came.
            form: That :meth:`form` gave.

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
            tensor = row_mask.scattered(tensor, arrived[self._mask])
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
        return self.name + row_mask.SUFFIX

    def _whole(self, form: TensorForm, mask: TensorForm) -> TensorForm:
        if not self.without_zeros:
            raise CodecError(f"{self.name!r} travels with all of its rows; {self._mask!r} came.")
        try:
            return row_mask.whole_form(form, mask)
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
