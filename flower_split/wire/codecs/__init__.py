"""How activations and their gradients travel: codecs by name.

Runs on: The client and the trunk.
Read first: ``codec.py``, then ``casts.py`` for the built-in ones.
"""

from flower_split.wire.codecs.codec import Codec, TensorForm
from flower_split.wire.codecs.registry import CODECS, NATIVE, make_codec

__all__ = ["CODECS", "NATIVE", "Codec", "TensorForm", "make_codec"]
