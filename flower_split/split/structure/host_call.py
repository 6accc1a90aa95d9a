"""The call that lets a model's own forward prepare its layers' inputs.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError

# A padding mask ``[batch, seq]``; or, where layers need another one (images that see themselves whole),
# the mask that the model made, ``[batch or 1, heads or 1, seq, seq]``; or one of those per kind of layer.
Mask = Tensor | Mapping[str, Tensor | None] | None


def forbid_cache(host: nn.Module) -> None:
    """Let a model run without a cache unless it is told otherwise."""
    config = getattr(host, "config", None)
    if config is not None:
        config.use_cache = False


def embedding_width(model: PreTrainedModel | nn.Module) -> int:
    """Return the width of a model's input embeddings.

    Raises:
        SplitError: Its configuration names none: its layers have widths of their own.
    """
    config = getattr(model, "config", None)
    width = None
    if config is not None:
        width = getattr(config.get_text_config(decoder=True), "hidden_size", None)
    if not isinstance(width, int):
        raise SplitError(
            f"{type(model).__name__} has no one width of hidden states (hidden_size in its "
            "configuration), so its layers are no chain that a trunk could be a part of. This "
            "family cannot be split."
        )
    return width


def host_inputs(
    host: nn.Module,
    hidden_states: Tensor,
    width: int,
    attention_mask: Mask,
    position_ids: Tensor | None,
    use_cache: bool | None,
) -> dict[str, object]:
    """Return the arguments of the call that lets the model's own forward prepare its layers' inputs.

    Args:
        host: The module whose forward runs the layers.
        hidden_states: Smashed data; stands for the input embeddings as to shape and dtype.
        width: Of the input embeddings.
        attention_mask: Padding mask, ``[batch, seq]``, or what the model makes of one, or None.
        position_ids: ``[batch or 1, seq]``, with an axis before them if there are several; or None.
        use_cache: As the model's argument.
    """
    accepted = argument_names(type(host).forward)
    # A copy: a forward may scale its input embeddings in place.
    embeddings = hidden_states.detach().clone()
    if embeddings.shape[-1] != width or embeddings.dim() != 3:
        embeddings = embeddings.new_zeros(*embeddings.shape[:2], width)
    candidates: dict[str, object] = {
        "inputs_embeds": embeddings,
        "attention_mask": dict(attention_mask)
        if isinstance(attention_mask, Mapping)
        else attention_mask,
        "position_ids": position_ids,
        "use_cache": use_cache,
    }
    inputs = {name: value for name, value in candidates.items() if name in accepted}
    if "inputs_embeds" not in accepted and "hidden_states" in accepted:
        inputs["hidden_states"] = embeddings
    elif "inputs_embeds" not in accepted:
        main_input = getattr(host, "main_input_name", "input_ids")
        if main_input != "input_ids":  # pixels and the like, of which the absent module makes these
            inputs[main_input] = embeddings
        else:
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            inputs[main_input] = ids
    elif "input_ids" in accepted and _is_required(type(host).forward, "input_ids"):
        inputs["input_ids"] = None
    return inputs


@functools.lru_cache(maxsize=64)
def argument_names(forward: Callable[..., object]) -> frozenset[str]:
    """Return the names of a forward's own arguments."""
    return frozenset(inspect.signature(forward).parameters)


@functools.lru_cache(maxsize=64)
def _is_required(forward: Callable[..., object], name: str) -> bool:
    return inspect.signature(forward).parameters[name].default is inspect.Parameter.empty
