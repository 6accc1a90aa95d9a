"""The client's model: the ordinary model class with the trunk called in place of its layers.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.cache import (
    CacheBook,
    CacheStep,
    enter_place_holder,
    find_cache,
    keeps_only_keys_and_values,
)
from flower_split.split.cuts import CutLayers
from flower_split.split.stack import LayerStack
from flower_split.split.stand_in import LayerOutput, StandIn, take_hidden_states

# Arguments of the model that no layer computes with, or that the trunk is given or builds itself.
_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "cache_position",
        "labels",
        "num_items_in_batch",
    }
)
# Where packed sequences begin: told by the position ids as well, which the trunk is given.
_PACKING_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})


@dataclass(frozen=True, slots=True)
class _Call:
    """What the trunk needs of the running call of a model around the layers."""

    attention_mask: object
    position_ids: Tensor | None
    use_cache: bool | None
    has_past: bool  # whether it goes on with a key-value cache
    unknown: tuple[str, ...]  # tensors among the arguments that the trunk does not receive
    outer: "_Call | None"  # the call of a model around this one


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@runtime_checkable
class CachingTrunk(Protocol):
    """A trunk that keeps keys and values between calls, if the client asks for it.

    It is called as ``trunk(hidden_states, attention_mask, position_ids, use_cache=..., cache=...)``.
    With ``cache`` it goes on from the positions that it keeps under ``cache.id``: the hidden states,
    the mask and the positions are those of the new positions only.
    """

    def release_cache(self, cache_id: int) -> None:
        """The client's cache is gone: forget the trunk's. Called once, on any thread."""
        ...


class IdentityTrunk(nn.Module):
    """A trunk that returns the hidden states it is given; a place holder until there is one."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return ``hidden_states``."""
        return hidden_states


class TrunkSlot(StandIn):
    """Stands where the trunk's first layer is, and calls the trunk.

    The trunk is held outside the module tree: its parameters are not the client's. Training mode
    is passed on to it.

    Args:
        layer: The layer that it replaces.
        output: The form of the family's layer outputs.
        index: The layer's index in the model.
        trunk: The module that is called.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int, trunk: nn.Module) -> None:
        super().__init__(layer, output, index)
        self._trunk = (trunk,)
        self._book = CacheBook()
        self.runs_with_cache = True  # whether the family's cache takes the place holders
        self._index = index

    @property
    def trunk(self) -> nn.Module:
        """The module that is called in place of the trunk layers."""
        return self._trunk[0]

    def replace(self, trunk: nn.Module) -> None:
        """Call ``trunk`` from now on."""
        self._trunk = (trunk,)
        trunk.train(self.training)

    def train(self, mode: bool = True) -> "TrunkSlot":
        """Set training mode, also on the trunk."""
        super().train(mode)
        self._trunk[0].train(mode)
        return self

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the trunk with the hidden states and the running call's mask and positions."""
        call = _call.get()
        if call is None:
            raise SplitError(
                "the trunk was reached outside a call of the model that owns its layers. Call the "
                "client model, not its layers."
            )
        hidden_states = take_hidden_states(args, kwargs)
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            # With nothing trainable below, autograd would skip a remote trunk's backward.
            hidden_states = hidden_states.detach().requires_grad_()
        mask, positions = _padding_mask(call), call.position_ids
        cache = find_cache(args, kwargs)
        step = None if cache is None else self._step(cache, hidden_states)
        if step is None and call.has_past:
            raise SplitError(
                "the trunk holds nothing of the key-value cache that the model was called with. A "
                "cache can be gone on with where every call was made without autograd (torch.no_grad()"
                ") and the trunk keeps caches; otherwise call the model, or its generate, with "
                "use_cache=False."
            )
        # Families with several streams of hidden states send them side by side.
        smashed = hidden_states.flatten(2)
        trunk = self.trunk
        if not isinstance(trunk, CachingTrunk):
            result = trunk(smashed, attention_mask=mask, position_ids=positions)
        elif step is None:
            result = trunk(smashed, mask, positions, use_cache=call.use_cache)
        else:
            if mask is not None:
                mask = mask[:, step.past_length :]
            result = trunk(smashed, mask, positions, use_cache=True, cache=step)
        return self._layer_output.wrap(result.reshape(hidden_states.shape))

    def _step(self, cache: Cache, hidden_states: Tensor) -> CacheStep | None:
        """The call with the trunk's side of ``cache``; None if the trunk is to keep nothing."""
        trunk, step = self.trunk, None
        if isinstance(trunk, CachingTrunk) and not torch.is_grad_enabled():
            step = self._book.begin(cache, self._index, hidden_states, trunk, trunk.release_cache)
        if not torch.is_grad_enabled():
            enter_place_holder(cache, self._index, hidden_states)
        return step


@functools.lru_cache(maxsize=64)
def _signature(forward: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(forward)


def _note_call(model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Before a model around the layers runs: keep its mask and positions for the trunk."""
    bound = _signature(type(model).forward).bind(model, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    named.pop("self", None)
    cache = named.pop("past_key_values", None)
    use_cache = named.get("use_cache")
    if use_cache is None and getattr(model.config, "use_cache", None) is False:
        use_cache = False
    known = _KNOWN_ARGUMENTS | {model.main_input_name}
    if _PACKING_ARGUMENTS & named.keys() and isinstance(named.get("position_ids"), Tensor):
        # Layers of other kinds, such as linear attention, need them themselves.
        if keeps_only_keys_and_values(model.config):
            known |= _PACKING_ARGUMENTS
    unknown = (
        name for name, value in named.items() if isinstance(value, Tensor) and name not in known
    )
    _call.set(
        _Call(
            attention_mask=named.get("attention_mask"),
            position_ids=named.get("position_ids"),
            use_cache=use_cache,
            has_past=isinstance(cache, Cache) and bool(cache.get_seq_length() > 0),
            unknown=tuple(unknown),
            outer=_call.get(),
        )
    )


def _note_host_call(
    model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """As :func:`_note_call`, before the module that owns the layers; refuse what does not fit."""
    _note_call(model, args, kwargs)
    call = _call.get()
    assert call is not None
    _padding_mask(call)


def _forget_call(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    call = _call.get()
    _call.set(None if call is None else call.outer)


def _padding_mask(call: _Call) -> Tensor | None:
    """The padding mask of a call of the module that owns the layers.

    A model may hand that module a mask that it made; then the mask it was given itself counts,
    as long as it made the other from that alone.

    Raises:
        SplitError: The call has arguments that the trunk would need and does not receive.
    """
    while True:
        if call.unknown:
            raise SplitError(
                f"the model was called with {call.unknown[0]}, which the trunk does not receive, "
                "so its layers would compute something else. Call the split model without "
                f"{call.unknown[0]}."
            )
        mask = call.attention_mask
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        if call.outer is None:
            raise SplitError(
                "a split model takes a padding mask of shape [batch, seq]; it was given "
                f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
            )
        call = call.outer


def client_replacements(
    root: nn.Module, stack: LayerStack, cuts: CutLayers, output: LayerOutput, trunk: nn.Module
) -> dict[str, nn.Module]:
    """What to put where, so that ``root`` keeps the bottom's and the top's weights alone.

    Returns:
        Dotted name in ``root`` -> replacement.
    """
    layers = stack.layers(root)
    replacements: dict[str, nn.Module] = {
        stack.layer_path(index): StandIn(layers[index], output, index)
        for index in range(cuts.first + 1, cuts.second)
    }
    first = layers[cuts.first]
    replacements[stack.layer_path(cuts.first)] = TrunkSlot(first, output, cuts.first, trunk)
    return replacements


def wire_client(client: PreTrainedModel, stack: LayerStack) -> None:
    """Make ``client``, whose layers are replaced, hand its mask and positions to the trunk."""
    parts = stack.host_path.split(".") if stack.host_path else []
    for depth in range(len(parts) + 1):
        model = client.get_submodule(".".join(parts[:depth]))
        if isinstance(model, PreTrainedModel):
            note = _note_host_call if depth == len(parts) else _note_call
            model.register_forward_pre_hook(note, with_kwargs=True)
            model.register_forward_hook(_forget_call, always_call=True)
    _note_caching(client)


def _note_caching(client: nn.Module) -> None:
    """Let generate() keep keys and values where the trunk does; elsewhere it computes the prefix."""
    generation_config = getattr(client, "generation_config", None)
    model_config = getattr(client, "config", None)
    if generation_config is not None and model_config is not None:
        trunk = trunk_slot(client).trunk
        generation_config.use_cache = (
            trunk_slot(client).runs_with_cache
            and isinstance(trunk, CachingTrunk)
            and keeps_only_keys_and_values(model_config)
        )


def trunk_slot(client: nn.Module) -> TrunkSlot:
    """The place in a client model from which the trunk is called.

    Raises:
        SplitError: ``client`` is not a client model.
    """
    for module in client.modules():
        if isinstance(module, TrunkSlot):
            return module
    raise SplitError(
        f"{type(client).__name__} is not a client model: it has no trunk. Make one with "
        "split_model or load_client_model."
    )


def set_trunk(client: nn.Module, trunk: nn.Module) -> None:
    """Make a client model call another trunk from now on.

    Args:
        client: A client model, or a wrapper around one.
        trunk: Any module called as ``trunk(hidden_states, attention_mask=None,
            position_ids=None) -> hidden_states``.

    Raises:
        SplitError: ``client`` is not a client model.
    """
    trunk_slot(client).replace(trunk)
    _note_caching(client)
