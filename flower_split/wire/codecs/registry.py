"""Activation codecs by name: those built in, and those of installed distributions."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeGuard

from flower_split.errors import ConfigError
from flower_split.runtime.registry import Registry
from flower_split.wire.codecs.codec import (
    BFloat16Codec,
    Codec,
    Float32Codec,
    NativeCodec,
    stays_on_device,
)
from flower_split.wire.codecs.int8 import Int8Codec

NATIVE = "native"
"""The codec of parties that name none."""
BUILT_IN: MappingProxyType[str, type[Codec]] = MappingProxyType(
    {
        NATIVE: NativeCodec,
        "float32": Float32Codec,
        "bfloat16": BFloat16Codec,
        "int8": Int8Codec,
    }
)


def _is_codec(found: object) -> TypeGuard[type[Codec]]:
    return isinstance(found, type) and issubclass(found, Codec)


def _codecs(key: str) -> Registry[type[Codec]]:
    """Return the registry of the codecs that ``key`` of the run config names."""
    return Registry(
        group="flower_split.codecs",
        key=key,
        form="a subclass of flower_split.wire.codecs.Codec",
        machines="the clients and the trunk run",
        built_in=BUILT_IN,
        accepts=_is_codec,
        error=ConfigError,
    )


CODECS = _codecs("trunk.wire-dtype")
GRADIENT_CODECS = _codecs("trunk.gradient-wire-dtype")


def make_codec(name: str, registry: Registry[type[Codec]] = CODECS) -> Codec:
    """Return a codec by its name.

    Args:
        name: A built-in's, an entry point's, or an import path ``"module:Class"``.
        registry: The registry of the key that names it.

    Raises:
        ConfigError: It is unknown, cannot be imported, or is not a codec that can be made without
            arguments.
    """
    made = registry.get(name)
    try:
        return made()
    except Exception as error:  # a plug-in may raise anything, and be abstract still
        raise ConfigError(
            f"{registry.key} {name!r} cannot be made without arguments: "
            f"{type(error).__name__}: {error}. Correct the plug-in."
        ) from error


@dataclass(frozen=True, slots=True)
class WireCodecs:
    """The codecs of one client's calls.

    Args:
        activations: The codec of smashed data and ``trunk_output``.
        gradients: The codec of their gradients.
    """

    activations: Codec
    gradients: Codec

    @classmethod
    def make(cls, activations: str = NATIVE, gradients: str = "") -> "WireCodecs":
        """Return two codecs by name.

        Args:
            activations: As ``trunk.wire-dtype`` says.
            gradients: As ``trunk.gradient-wire-dtype`` says; empty: as the activations.

        Raises:
            ConfigError: As of :func:`make_codec`.
        """
        return cls(
            make_codec(activations),
            make_codec(gradients, GRADIENT_CODECS) if gradients else make_codec(activations),
        )

    @property
    def stay_on_device(self) -> bool:
        """Whether both send tensors themselves, wherever they lie."""
        return stays_on_device(self.activations) and stays_on_device(self.gradients)
