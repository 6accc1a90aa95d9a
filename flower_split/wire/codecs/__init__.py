"""How activations and their gradients travel: codecs by name.

Runs on: The client and the trunk.
Read first: ``codec.py``, which has the built-in ones too.
"""

from flower_split.wire.codecs.codec import Codec, Coded, TensorForm, stays_on_device
from flower_split.wire.codecs.registry import CODECS, NATIVE, make_codec

__all__ = [
    "CODECS",
    "NATIVE",
    "Coded",
    "Codec",
    "TensorForm",
    "make_codec",
    "stays_on_device",
]
