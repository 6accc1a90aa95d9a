"""The stand-ins for the trunk's layers on a client: the first calls the trunk, the others pass by.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.

What the trunk's layers compute must be what the unsplit model's would, whatever the model is called
with. So every call is checked for what the trunk cannot know: if the model is given tensors that the
trunk is not, a rehearsal of the trunk's forward tells whether they make a difference to its layers.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache

from flower_split.errors import SplitError
from flower_split.split.client_side.rehearsal import Rehearsal
from flower_split.split.client_side.running_call import (
    Expected,
    ModelCall,
    mask_for_trunk,
    padding_mask,
    running_call,
)
from flower_split.split.structure.host_call import Mask, argument_names
from flower_split.split.structure.kv_cache import (
    CacheBook,
    CacheStep,
    enter_place_holder,
    find_cache,
)
from flower_split.split.structure.layer_arguments import by_place, tensors_of
from flower_split.split.structure.probe import same_bits
from flower_split.split.structure.stand_in import LayerOutput, StandIn, take_hidden_states

# Arguments that a trunk's forward may have: see TrunkModel.forward.
LAYER_ARGUMENTS, HOST_ARGUMENTS = "layer_arguments", "host_arguments"


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
        carried: Places of layer arguments that the trunk is given, because it cannot make them.
        ignored: Places of layer arguments that the trunk is not given and has no need of.
        rehearsal: Rehearses the trunk's forward; None where there is none.
        learned: While the client model is being made: what the layers would be given, per call.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int, trunk: nn.Module) -> None:
        super().__init__(layer, output, index)
        self._trunk = (trunk,)
        self._book = CacheBook()
        self.runs_with_cache = True  # whether the family's cache takes the place holders
        self._index = index
        self.carried: tuple[str, ...] = ()
        self.ignored: frozenset[str] = frozenset()
        self.rehearsal: Rehearsal | None = None
        self.learned: list[dict[int, dict[str, Tensor]]] | None = None

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
        if self.rehearsal is not None:
            self.rehearsal.move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the trunk with the hidden states and the running call's mask and positions."""
        call = running_call.get()
        if call is None:
            raise SplitError(
                "the trunk was reached outside a call of the model that owns its layers. Call the "
                "client model, not its layers."
            )
        hidden_states = take_hidden_states(args, kwargs)
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            # With nothing trainable below, autograd would skip a remote trunk's backward.
            hidden_states = hidden_states.detach().requires_grad_()
        mask = mask_for_trunk(call)
        if call.unknown or self.learned is not None:
            self._rehearse(call, hidden_states, mask)
            if call.rehearsed is not None:
                _check_arguments(self._index, args, kwargs, call, call.rehearsed)
        given = {
            LAYER_ARGUMENTS: self._carried_arguments(args, kwargs),
            HOST_ARGUMENTS: self._shared_arguments(call),
        }
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
        smashed = hidden_states.flatten(2)
        result = self._call_trunk(call, smashed, mask, step, given).reshape(hidden_states.shape)
        call.returned = result, result._version
        return self._layer_output.wrap(result, args, kwargs)

    def _call_trunk(
        self,
        call: ModelCall,
        smashed: Tensor,
        mask: Mask,
        step: CacheStep | None,
        given: dict[str, dict[str, Tensor]],
    ) -> Tensor:
        trunk, positions = self.trunk, call.position_ids
        options = {argument: tensors for argument, tensors in given.items() if tensors}
        result: Tensor
        if not isinstance(trunk, CachingTrunk):
            result = trunk(smashed, attention_mask=mask, position_ids=positions, **options)
        elif step is None:
            result = trunk(smashed, mask, positions, use_cache=call.use_cache, **options)
        else:
            more = {**given[HOST_ARGUMENTS], **self._whole_mask(mask)}
            padding = padding_mask(call)
            if given[LAYER_ARGUMENTS]:
                raise SplitError(
                    "with a key-value cache the trunk takes nothing that the client's weights make "
                    "for its layers. Call the model, or its generate, with use_cache=False."
                )
            if padding is not None:
                padding = padding[:, step.past_length :]
            extra = {HOST_ARGUMENTS: more} if more else {}
            result = trunk(smashed, padding, positions, use_cache=True, cache=step, **extra)
        return result

    def _whole_mask(self, mask: Mask) -> dict[str, Tensor]:
        """Return a mask that does not follow from padding, as an argument beside the padding mask."""
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return {}
        self._check_takes(HOST_ARGUMENTS, ("attention_mask",))
        if isinstance(mask, Mapping) and any(part is None for part in mask.values()):
            raise SplitError(
                "with a key-value cache the trunk takes a mask for every kind of layer, or none; the "
                "model made some. Call the model, or its generate, with use_cache=False."
            )
        return by_place({"attention_mask": mask})

    def _rehearse(self, call: ModelCall, hidden_states: Tensor, mask: Mask) -> None:
        """Find out what the trunk's layers will be given."""
        if self.rehearsal is None:
            if self.learned is not None:
                return
            raise SplitError(
                f"the model was called with {', '.join(call.unknown)}, which the trunk does not "
                f"receive. Call the split model without {next(iter(call.unknown))}."
            )
        beside = (mask, call.position_ids, call.use_cache)
        if self.learned is not None:
            self.learned.append(self.rehearsal.arguments(hidden_states, *beside).arguments)
            return
        whole = self.rehearsal.arguments(hidden_states, *beside, call.unknown)
        call.shared = whole.changes
        if not call.shared:
            whole = self.rehearsal.arguments(hidden_states, *beside)
        call.rehearsed = Expected(whole.arguments, frozenset(self.carried) | self.ignored)

    def _shared_arguments(self, call: ModelCall) -> dict[str, Tensor]:
        """Return what the trunk's forward needs to add to the hidden states between its layers."""
        if not call.shared:
            return {}
        self._check_takes(HOST_ARGUMENTS, tuple(call.unknown))
        shared = by_place(call.unknown)
        for place, tensor in shared.items():
            if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
                raise SplitError(
                    f"the model adds something of {place} to the hidden states between layers of the "
                    "trunk, and integers, which may be token ids, do not leave the client. Choose "
                    "other cut layers."
                )
        return shared

    def _check_takes(self, argument: str, places: tuple[str, ...]) -> None:
        if argument not in argument_names(type(self.trunk).forward):
            raise SplitError(
                f"the trunk's layers need what this client makes ({', '.join(places)}), and "
                f"{type(self.trunk).__name__} takes none of it: its forward has no argument "
                f"{argument}. Use TrunkModel or RemoteTrunk, or other cut layers."
            )

    def _carried_arguments(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, Tensor]:
        if not self.carried:
            return {}
        self._check_takes(LAYER_ARGUMENTS, self.carried)
        there = tensors_of(args, kwargs)
        return {place: there[place] for place in self.carried}

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
                _check_arguments(self._index, args, kwargs, call, call.rehearsed)
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


def _check_arguments(
    index: int,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    call: ModelCall,
    rehearsed: Expected,
) -> None:
    """Check that the trunk's layer ``index`` is given what the client's forward gives it."""
    there, expected = tensors_of(args, kwargs), rehearsed.prepared.get(index, {})
    for place in sorted((there.keys() | expected.keys()) - rehearsed.apart):
        one, other = there.get(place), expected.get(place)
        if one is None or other is None or not rehearsed.same(one, other):
            raise SplitError(
                f"the model was called with {', '.join(call.unknown)}, which the trunk does not "
                f"receive, so its layers would compute something else: layer {index} is given another "
                f"{place}. Call the split model without {next(iter(call.unknown))}."
            )
