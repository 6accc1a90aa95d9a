"""The call that lets a model's own forward prepare its layers' inputs.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn


def forbid_cache(host: nn.Module) -> None:
    """Let a model run without a cache unless it is told otherwise."""
    config = getattr(host, "config", None)
    if config is not None:
        config.use_cache = False


def host_inputs(
    host: nn.Module,
    hidden_states: Tensor,
    width: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    use_cache: bool | None,
) -> dict[str, object]:
    """The arguments of the call that lets the model's own forward prepare its layers' inputs.

    Args:
        host: The module whose forward runs the layers.
        hidden_states: Smashed data; stands for the input embeddings as to shape and dtype.
        width: Of the input embeddings.
        attention_mask: Padding mask, ``[batch, seq]``, or None.
        position_ids: ``[batch or 1, seq]`` or None.
        use_cache: As the model's argument.
    """
    accepted = argument_names(type(host).forward)
    # A copy: a forward may scale its input embeddings in place.
    embeddings = hidden_states.detach().clone()
    if embeddings.shape[-1] != width or embeddings.dim() != 3:
        embeddings = embeddings.new_zeros(*embeddings.shape[:2], width)
    candidates: dict[str, object] = {
        "inputs_embeds": embeddings,
        "attention_mask": attention_mask,
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
    return inputs


@functools.lru_cache(maxsize=64)
def argument_names(forward: Callable[..., object]) -> frozenset[str]:
    """The names of a forward's own arguments."""
    return frozenset(inspect.signature(forward).parameters)
