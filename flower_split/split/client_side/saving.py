"""Saving a client model: its adapter, never what would load as a whole model."""

from collections.abc import Callable
from os import PathLike
from types import MethodType

from transformers import PreTrainedModel

from flower_split.errors import SplitError


def refuse_plain_saving(client: PreTrainedModel) -> None:
    """Make ``client.save_pretrained`` save adapters that transformers attached, and nothing else."""
    client.save_pretrained = MethodType(_save_pretrained, client)  # type: ignore[method-assign]


def _save_pretrained(
    client: PreTrainedModel, save_directory: str | PathLike[str], *args: object, **kwargs: object
) -> None:
    """Save an adapter that transformers attached; refuse to save the base model.

    What would be written has no weights for the trunk's layers, and ``from_pretrained`` would fill
    them with fresh ones and load it as a whole model.

    Raises:
        SplitError: The client model has no such adapter.
    """
    if not getattr(client, "_hf_peft_config_loaded", False):
        raise SplitError(
            "a client model cannot be saved with save_pretrained: it holds only the bottom and the top, "
            "and from_pretrained would load it with fresh layers in the middle. Save its adapter "
            "(flower_split.lora.adapter_state, PeftModel.save_pretrained), or the whole adapted model "
            "of a run (flower-split export)."
        )
    save: Callable[..., None] = PreTrainedModel.save_pretrained
    save(client, save_directory, *args, **kwargs)
