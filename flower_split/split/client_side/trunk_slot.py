"""The stand-ins for the trunk's layers on a client: the first calls the trunk, the others pass by.

Hooks on the models around the layers (:func:`note_call`, :func:`forget_call`) keep what the slot needs
of the running call: its padding mask and its positions.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from flower_split.errors import SplitError
from flower_split.split.client_side.running_call import (
    HOST_ARGUMENTS,
    LAYER_ARGUMENTS,
    ModelCall,
    OtherArguments,
    check_arguments,
    padding_mask,
    running_call,
    whole_mask,
)
from flower_split.split.structure.host_call import (
    CACHE_ARGUMENTS,
    LayerOutput,
    Mask,
    StandIn,
    take_hidden_states,
)
from flower_split.split.structure.kv_cache import (
    CacheBook,
    CacheStep,
    enter_place_holder,
    find_cache,
    keeps_only_keys_and_values,
)
from flower_split.split.structure.layer_arguments import nested_tensors
from flower_split.split.structure.probe import same_bits

# Arguments of the model that no layer computes with, or that the trunk is given or builds itself.
_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "use_cache",
        "cache_position",
        "labels",
        "num_items_in_batch",
    }
)
# Where packed sequences begin: told by the position ids as well, which the trunk is given.
_PACKING_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})


@functools.lru_cache(maxsize=64)
def _signature(forward: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(forward)


def note_call(model: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Keep a model's mask and positions for the trunk, before it runs.

    Raises:
        SplitError: It is called with what no model in two places can do.
    """
    bound = _signature(type(model).forward).bind(model, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    named.pop("self", None)
    config = getattr(model, "config", None)
    routing = named.get("output_router_logits", getattr(config, "output_router_logits", False))
    if routing:
        raise SplitError(
            "the model was called with output_router_logits, for an auxiliary loss over all layers, "
            "of which the client has some. Set output_router_logits to False."
        )
    caches = [named.pop(name, None) for name in CACHE_ARGUMENTS]
    cache = next((given for given in caches if given is not None), None)
    layers = getattr(cache, "layers", ())  # a pair, of encoder and decoder, has none itself
    if any(isinstance(layer, StaticLayer) for layer in layers):
        raise SplitError(
            f"the model was called with a {type(cache).__name__} of a fixed length, and the trunk's "
            'grows with the positions it is sent. Generate with cache_implementation="dynamic" (the '
            "default), or with use_cache=False."
        )
    use_cache = named.get("use_cache")
    if use_cache is None and getattr(model.config, "use_cache", None) is False:
        use_cache = False
    known = _KNOWN_ARGUMENTS | {model.main_input_name}
    if _PACKING_ARGUMENTS & named.keys() and isinstance(named.get("position_ids"), Tensor):
        # Layers of other kinds, such as linear attention, need them themselves.
        if keeps_only_keys_and_values(model.config):
            known |= _PACKING_ARGUMENTS
    unknown = {n: v for n, v in named.items() if n not in known and nested_tensors(v)}
    running_call.set(
        ModelCall(
            attention_mask=named.get("attention_mask"),
            position_ids=named.get("position_ids"),
            use_cache=use_cache,
            has_past=isinstance(cache, Cache) and bool(cache.get_seq_length() > 0),
            unknown=unknown,
            outer=running_call.get(),
        )
    )


def forget_call(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Forget a model's call, after it has run."""
    call = running_call.get()
    running_call.set(None if call is None else call.outer)


def mask_for_trunk(call: ModelCall) -> Mask:
    """Return the mask that the trunk is given in a call of the module that owns the layers.

    A model may hand that module a mask that it made; then the padding mask it was given itself
    counts, as long as it made the other from that alone.

    Raises:
        SplitError: The mask is of no form that there is.
    """
    around: ModelCall | None = call
    while around is not None:
        mask = around.attention_mask
        if around is not call and around.unknown:
            break  # which may have gone into the mask
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        around = around.outer
    made = call.attention_mask
    masks = made.values() if isinstance(made, Mapping) else [made]
    if not all(m is None or (isinstance(m, Tensor) and m.dim() in (2, 4)) for m in masks):
        raise SplitError(
            "a split model takes a padding mask of shape [batch, seq], or the whole mask, [batch, 1, "
            f"seq, seq]; it was given {list(made.shape) if isinstance(made, Tensor) else made!r}."
        )
    return made  # type: ignore[return-value]


@runtime_checkable
class CachingTrunk(Protocol):
    """A trunk that keeps keys and values between calls, if the client asks for it.

    It is called as ``trunk(hidden_states, attention_mask, position_ids, use_cache=..., cache=...)``.
    With ``cache`` it goes on from the positions that it keeps under ``cache.id``: the hidden states,
    the mask and the positions are those of the new positions only.
    """

    def release_cache(self, cache_id: int) -> None:
        """Forget the trunk's side of a cache that the client has let go. Called once, on any thread."""
        ...


class IdentityTrunk(nn.Module):
    """A trunk that returns the hidden states it is given; a place holder until there is one."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        layer_arguments: Mapping[str, Tensor] | None = None,
        host_arguments: Mapping[str, Tensor] | None = None,
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

    Attributes:
        others: What the model is called with that the trunk cannot make for itself.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int, trunk: nn.Module) -> None:
        super().__init__(layer, output, index)
        self._trunk = (trunk,)
        self._book = CacheBook()
        self.runs_with_cache = True  # whether the family's cache takes the place holders
        self._index = index
        self.others = OtherArguments(index)

    @property
    def trunk(self) -> nn.Module:
        """Return the module that is called in place of the trunk layers."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrunkSlot":
        if self.others.rehearsal is not None:
            self.others.rehearsal.move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the trunk with the hidden states and the running call's mask and positions."""
        call, trunk = running_call.get(), self._trunk[0]
        if call is None:
            raise SplitError(
                "the trunk was reached outside a call of the model that owns its layers. Call the "
                "client model, not its layers."
            )
        mask, hidden_states = mask_for_trunk(call), take_hidden_states(args, kwargs)
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            # With nothing trainable below, autograd would skip a remote trunk's backward.
            hidden_states = hidden_states.detach().requires_grad_()
        if call.unknown or self.others.learned is not None:
            self.others.rehearse(call, hidden_states, mask, args, kwargs)
        given: dict[str, dict[str, Tensor]] = {}
        if call.shared or self.others.carried:
            given = self.others.given(call, args, kwargs, trunk)
        # With autograd no call goes on with a cache, so there is nothing to keep count of.
        cache = None if torch.is_grad_enabled() else find_cache(args, kwargs)
        step = None if cache is None else self._step(cache, hidden_states)
        if step is None and call.has_past:
            raise SplitError(
                "the trunk holds nothing of the key-value cache that the model was called with. A "
                "cache can be gone on with where every call was made without autograd (torch.no_grad()"
                ") and the trunk keeps caches; otherwise call the model, or its generate, with "
                "use_cache=False."
            )
        # Families with several streams of hidden states send them side by side.
        smashed, positions = hidden_states.flatten(2), call.position_ids
        result: Tensor
        if step is not None:
            result = self._go_on(call, smashed, mask, step, given)
        elif isinstance(trunk, CachingTrunk):
            result = trunk(smashed, mask, positions, use_cache=call.use_cache, **given)
        else:
            result = trunk(smashed, attention_mask=mask, position_ids=positions, **given)
        result = result.reshape(hidden_states.shape)
        call.returned = result, result._version
        return self._layer_output.wrap(result, args, kwargs)

    def _go_on(
        self,
        call: ModelCall,
        smashed: Tensor,
        mask: Mask,
        step: CacheStep,
        given: dict[str, dict[str, Tensor]],
    ) -> Tensor:
        """Call the trunk with the new positions of a key-value cache."""
        trunk, padding = self._trunk[0], padding_mask(call)
        more = {**given.get(HOST_ARGUMENTS, {}), **whole_mask(mask, trunk)}
        if given.get(LAYER_ARGUMENTS):
            raise SplitError(
                "with a key-value cache the trunk takes nothing that the client's weights make "
                "for its layers. Call the model, or its generate, with use_cache=False."
            )
        if padding is not None:
            padding = padding[:, step.past_length :]
        extra = {HOST_ARGUMENTS: more} if more else {}
        result: Tensor = trunk(
            smashed, padding, call.position_ids, use_cache=True, cache=step, **extra
        )
        return result

    def _step(self, cache: Cache, hidden_states: Tensor) -> CacheStep | None:
        """Return the call with the trunk's side of ``cache``; None if the trunk keeps nothing."""
        trunk, step = self.trunk, None
        if isinstance(trunk, CachingTrunk):
            step = self._book.begin(cache, self._index, hidden_states, trunk, trunk.release_cache)
        enter_place_holder(cache, self._index, hidden_states)
        return step


class PassThrough(StandIn):
    """Stands where another of the trunk's layers is; what comes in must be what the trunk returned.

    Args:
        layer: The layer that it replaces.
        output: The form of the family's layer outputs.
        index: The layer's index in the model.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int) -> None:
        super().__init__(layer, output, index)
        self._index = index

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first argument, in the form of the family's layer outputs.

        Raises:
            SplitError: The model's forward changes the hidden states between the trunk's layers, or
                gives this one what the trunk's layer is not given.
        """
        call = running_call.get()
        if call is not None and call.returned is not None:
            if call.rehearsed is not None:
                check_arguments(self._index, args, kwargs, call, call.rehearsed)
            if call.shared:  # what the client's forward added, the trunk's has added itself
                return self._layer_output.wrap(call.returned[0], args, kwargs)
            hidden_states, (returned, version) = take_hidden_states(args, kwargs), call.returned
            if hidden_states is not returned or returned._version != version:
                _check_unchanged(hidden_states, returned, version, self._index)
        return super().forward(*args, **kwargs)


def _check_unchanged(hidden_states: Tensor, returned: Tensor, version: int, index: int) -> None:
    """Check that the hidden states that reach a stand-in are those that the trunk returned."""
    if returned._version == version and same_bits(hidden_states.detach(), returned.detach()):
        return
    raise SplitError(
        f"the model changes the hidden states right before layer {index}, between layers of the "
        "trunk, where the client cannot reach them (as when features of an image are added after "
        f"the first layers). Choose cut layers with first >= {index}, or call the model without "
        "what it adds there."
    )
