"""One tensor of a message through a codec: its parts out, and in again, checked on both sides."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from flower_split.errors import CodecError
from flower_split.wire.codecs.codec import Codec, TensorForm
from flower_split.wire.frames import Incoming, Received
from flower_split.wire.staging import Allocate, pooled

_SEPARATOR = "/"


def encode(codec: Codec, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that travel for ``tensor``: ``name`` and ``name/part``, by the parts' names.

    Raises:
        CodecError: The codec fails.
    """
    try:
        parts = codec.encode(tensor.detach())
    except CodecError:
        raise
    except Exception as error:  # a plug-in may raise anything
        raise _failed(codec, f"encode {name!r} ({TensorForm.of(tensor)})", error) from error
    return {f"{name}{_SEPARATOR}{part}" if part else name: value for part, value in parts.items()}


def receive(
    incoming: Incoming,
    codec: Codec,
    name: str,
    max_bytes: int,
    *,
    allocate: Allocate = pooled,
    digest: bool = False,
    like: TensorForm | None = None,
) -> Received:
    """Receive a message, and decode its tensor ``name``; where none travels, none is there.

    Everything that is announced is checked before memory is allocated for it. The digest is over
    what travels, so that it needs no decoding to recognise a call that is sent again.

    Args:
        incoming: The message, whose header has been read.
        codec: What its sender has encoded with.
        name: Of the tensor.
        max_bytes: Limit on all tensors of the message, as they travel and as they are decoded.
        allocate: Where payloads go.
        digest: Whether to hash what arrives.
        like: The form that the tensor must have; None: any.

    Raises:
        CodecError: A description is wrong or too large, the parts are not the codec's, or the
            tensor has another form than ``like``.
    """
    forms = {item.name: TensorForm(item.shape, item.dtype) for item in incoming.layouts(max_bytes)}
    parts = {_part(key, name): form for key, form in forms.items() if _is_part(key, name)}
    if not parts:
        if like is not None:
            raise CodecError(f"{name!r} of {like} must come; there are {sorted(forms)}.")
        return incoming.receive(max_bytes, allocate=allocate, digest=digest)
    form = _form(codec, name, parts)
    if like is not None and form != like:
        raise CodecError(f"{name!r} must be {like}; it is announced as {form}.")
    rest = sum(form.num_bytes for key, form in forms.items() if not _is_part(key, name))
    if form.num_bytes + rest > max_bytes:
        raise CodecError(
            f"the tensors of one message may hold {max_bytes} bytes; decoded, these hold "
            f"{form.num_bytes + rest}. Send smaller micro-batches (train.batch-size, "
            "train.sequence-length)."
        )
    received = incoming.receive(max_bytes, allocate=allocate, digest=digest)
    tensors = {key: value for key, value in received.tensors.items() if not _is_part(key, name)}
    arrived = {
        _part(key, name): value for key, value in received.tensors.items() if _is_part(key, name)
    }
    return replace(received, tensors={name: _decode(codec, name, arrived, form), **tensors})


def _is_part(key: str, name: str) -> bool:
    return key == name or key.startswith(name + _SEPARATOR)


def _part(key: str, name: str) -> str:
    return key.removeprefix(name).removeprefix(_SEPARATOR)


def _form(codec: Codec, name: str, parts: Mapping[str, TensorForm]) -> TensorForm:
    try:
        return codec.form(parts)
    except CodecError as error:
        raise CodecError(f"{name!r} is not of codec {type(codec).__name__}: {error}") from error
    except Exception as error:  # a plug-in may raise anything
        announced = ", ".join(f"{part!r}: {form}" for part, form in parts.items())
        raise _failed(codec, f"read the descriptions of {name!r} ({announced})", error) from error


def _decode(codec: Codec, name: str, parts: Mapping[str, Tensor], form: TensorForm) -> Tensor:
    try:
        tensor = codec.decode(parts)
    except CodecError as error:
        raise CodecError(f"{name!r} is not of codec {type(codec).__name__}: {error}") from error
    except Exception as error:  # a plug-in may raise anything
        raise _failed(codec, f"decode {name!r} ({form})", error) from error
    if (tuple(tensor.shape), tensor.dtype) != (form.shape, form.dtype):
        raise CodecError(
            f"codec {type(codec).__name__} decodes {name!r} to {TensorForm.of(tensor)}, and has "
            f"announced {form}. Correct the plug-in."
        )
    return tensor


def _failed(codec: Codec, what: str, error: Exception) -> CodecError:
    return CodecError(
        f"codec {type(codec).__name__} cannot {what}: {type(error).__name__}: {error}. Correct the "
        "plug-in, or choose another trunk.wire-dtype."
    )
