"""Which base model is loaded, and how: what the loaders of all parts share."""

from dataclasses import dataclass

import torch

from flower_split.assets import resolve_model_path
from flower_split.config import ModelConfig
from flower_split.errors import SplitError
from flower_split.split.structure.quantization import Quantization


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A base model as the loaders take it, without cut layers and device."""

    name_or_path: str
    """Local directory or hub id of a checkpoint in safetensors."""
    revision: str | None = None
    """Hub revision; None: the default branch."""
    attn_implementation: str | None = None
    """Attention implementation, by transformers' name; None: the model's default."""
    dtype: torch.dtype | str | None = None
    """dtype of the weights; None: the checkpoint's."""
    quantization: Quantization | None = None
    """Quantization of the base weights; None: as the checkpoint is."""
    task: str = ""
    """What the model does, as ``model.task`` says it; empty: the loader's auto class says so."""
    labels: tuple[str, ...] = ()
    """The classes of a classification; empty: those of the checkpoint."""

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSource":
        """Return the base model that a run config names.

        Raises:
            ConfigError: It is the packaged model, and the package was installed without it.
        """
        return cls(
            name_or_path=resolve_model_path(config.name),
            revision=config.revision or None,
            attn_implementation=config.attn_implementation or None,
            dtype=config.dtype,
            quantization=config.quantization or None,
            task=config.task,
            labels=config.label_names,
        )


def as_source(
    name_or_path: str | ModelSource,
    revision: str | None = None,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: Quantization | None = None,
) -> ModelSource:
    """Return the source that a loader's arguments name.

    Raises:
        SplitError: ``name_or_path`` is a source already, and a setting is given beside it.
    """
    if not isinstance(name_or_path, ModelSource):
        return ModelSource(
            name_or_path=name_or_path,
            revision=revision,
            attn_implementation=attn_implementation,
            dtype=dtype,
            quantization=quantization,
        )
    settings = {
        "revision": revision,
        "attn_implementation": attn_implementation,
        "dtype": dtype,
        "quantization": quantization,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if given:
        raise SplitError(
            f"a ModelSource says how {name_or_path.name_or_path!r} is loaded, so the loader takes no "
            f"setting beside it; it got {given}. Put them into the ModelSource."
        )
    return name_or_path
