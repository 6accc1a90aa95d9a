"""Activation codecs by name: those built in, and those of installed distributions."""

from types import MappingProxyType
from typing import TypeGuard

from flower_split.errors import ConfigError
from flower_split.runtime.registry import Registry
from flower_split.wire.codecs.codec import BFloat16Codec, Codec, Float32Codec, NativeCodec

NATIVE = "native"
"""The codec of parties that name none."""
BUILT_IN: MappingProxyType[str, type[Codec]] = MappingProxyType(
    {NATIVE: NativeCodec, "float32": Float32Codec, "bfloat16": BFloat16Codec}
)


def _is_codec(found: object) -> TypeGuard[type[Codec]]:
    return isinstance(found, type) and issubclass(found, Codec)


CODECS: Registry[type[Codec]] = Registry(
    group="flower_split.codecs",
    key="trunk.wire-dtype",
    form="a subclass of flower_split.wire.codecs.Codec",
    machines="the clients and the trunk run",
    built_in=BUILT_IN,
    accepts=_is_codec,
    error=ConfigError,
)


def make_codec(name: str) -> Codec:
    """Return a codec by its name.

    Args:
        name: A built-in's, an entry point's, or an import path ``"module:Class"``.

    Raises:
        ConfigError: It is unknown, cannot be imported, or is not a codec that can be made without
            arguments.
    """
    made = CODECS.get(name)
    try:
        return made()
    except Exception as error:  # a plug-in may raise anything, and be abstract still
        raise ConfigError(
            f"trunk.wire-dtype {name!r} cannot be made without arguments: "
            f"{type(error).__name__}: {error}. Correct the plug-in."
        ) from error
