"""How a part of a model computes: ``exact``, the unsplit model's own operations, or ``fast``.

``fast`` compiles every decoder layer on its own (regional ``torch.compile``: one compilation serves all
layers of a kind) and, where the base weights have 16 bits, computes under autocast, with LoRA in fp32
weights and 16-bit arithmetic, as an ordinary PEFT training loop does. In training nothing is put into a
key-value cache. Results differ from those of ``exact`` by the rounding of the dtype. On a GPU a client's
small layers may run as CUDA graphs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn

from flower_split.split.structure.host_call import StandIn
from flower_split.split.structure.layer_graphs import GraphedForward
from flower_split.split.structure.quantization import float_dtype

_HALF = (torch.bfloat16, torch.float16)

Forward = Callable[..., object]


def compute_fast(
    model: nn.Module, layers: Iterable[nn.Module], *, one_at_a_time: bool = False
) -> None:
    """Let ``model`` compute in mode ``fast``, in place.

    Args:
        model: A client's model or a trunk, with its adapter attached.
        layers: Its decoder layers; stand-ins for another party's layers are left as they are.
        one_at_a_time: Whether every forward has its backward, and the gradients their use, before the
            next forward begins: then layers on a GPU may be graphs, as
            :class:`~flower_split.split.structure.layer_graphs.GraphedForward` says.
    """
    for layer in layers:
        if not isinstance(layer, StandIn):
            # The forward and not the module: the hooks that begin and end a trunk's pass stay outside.
            forward = torch.compile(layer.forward)
            on_gpu = next(layer.parameters()).is_cuda
            vars(layer)["forward"] = (
                GraphedForward(layer, forward) if one_at_a_time and on_gpu else forward
            )
    vars(model)["forward"] = _without_cache(model, under_autocast(model, model.forward))


def under_autocast(model: nn.Module, forward: Forward) -> Forward:
    """Return ``forward`` under autocast to the dtype of the model's base weights, if that has 16 bits."""
    dtype = float_dtype(model)
    if dtype not in _HALF:
        return forward
    device = next(model.parameters()).device.type

    @functools.wraps(forward)  # transformers reads the signature
    def run(*args: object, **named: object) -> object:
        # Without its cache, which graphs cannot have: every weight is used once in a forward.
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return forward(*args, **named)

    return cast(Forward, run)


def _without_cache(model: nn.Module, forward: Forward) -> Forward:
    """Return ``forward`` that keeps no keys and values in training.

    A cache that grows from layer to layer makes every layer look different to the compiler.
    """

    @functools.wraps(forward)
    def run(*args: object, **named: object) -> object:
        if model.training:
            named["use_cache"] = False
        return forward(*args, **named)

    return cast(Forward, run)
