"""How activations and their gradients travel: codecs by name.

Runs on: The client and the trunk.
Read first: ``codec.py``, which has the simple built-in ones too; ``int8.py`` is the other.
"""

from flower_split.wire.codecs.codec import Codec, Coded, TensorForm, stays_on_device
from flower_split.wire.codecs.registry import (
    CODECS,
    GRADIENT_CODECS,
    NATIVE,
    WireCodecs,
    make_codec,
)

__all__ = [
    "CODECS",
    "GRADIENT_CODECS",
    "NATIVE",
    "Coded",
    "Codec",
    "TensorForm",
    "WireCodecs",
    "make_codec",
    "stays_on_device",
]
