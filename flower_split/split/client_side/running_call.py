"""The running call of a model around the trunk, and what of it the trunk cannot make for itself.

What the trunk's layers compute must be what the unsplit model's would, whatever the model is called
with. So every call is checked for what the trunk cannot know: if the model is given tensors that the
trunk is not, a rehearsal of the trunk's forward tells whether they make a difference to its layers.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flower_split.errors import SplitError
from flower_split.split.client_side.rehearsal import Rehearsal
from flower_split.split.structure.host_call import Mask, argument_names
from flower_split.split.structure.layer_arguments import by_place, tensors_of
from flower_split.split.structure.probe import same_bits

# Arguments that a trunk's forward may have: see TrunkModel.forward.
LAYER_ARGUMENTS, HOST_ARGUMENTS = "layer_arguments", "host_arguments"


@dataclass(slots=True)
class Expected:
    """What the trunk's layers are given, where the call leaves that in doubt."""

    prepared: dict[int, dict[str, Tensor]]  # layer -> place -> tensor
    apart: frozenset[str]  # places that need not agree
    # Pairs that do, kept so that none of the ids is used again: most are the same in all layers.
    agreed: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Return whether the two are equal bit for bit."""
        pair = id(one), id(other)
        if pair not in self.agreed:
            if not same_bits(one.detach(), other):
                return False
            self.agreed[pair] = one, other
        return True


@dataclass(slots=True)
class ModelCall:
    """What the trunk needs of the running call of a model around the layers."""

    attention_mask: object
    position_ids: Tensor | None
    use_cache: bool | None
    has_past: bool  # whether it goes on with a key-value cache
    unknown: dict[str, object]  # arguments with tensors in them that the trunk does not receive
    outer: "ModelCall | None"  # the call of a model around this one
    returned: tuple[Tensor, int] | None = None  # by the trunk, and autograd's count of its changes
    rehearsed: Expected | None = None
    shared: bool = False  # whether the trunk is given the unknown ones after all


running_call: ContextVar[ModelCall | None] = ContextVar("call", default=None)


def padding_mask(call: ModelCall) -> Tensor | None:
    """Return the padding mask of a call, or of the nearest one around it that has one."""
    around: ModelCall | None = call
    while around is not None:
        mask = around.attention_mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
        around = around.outer
    return None


class OtherArguments:
    """What a client model is called with beside padding mask and positions: passed on, or refused.

    Args:
        index: The index of the trunk's first layer.

    Attributes:
        carried: Places of layer arguments that the trunk is given, because it cannot make them.
        ignored: Places of layer arguments that the trunk is not given and has no need of.
        rehearsal: Rehearses the trunk's forward; None where there is none.
        learned: While the client model is being made: what the layers would be given, per call.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.carried: tuple[str, ...] = ()
        self.ignored: frozenset[str] = frozenset()
        self.rehearsal: Rehearsal | None = None
        self.learned: list[dict[int, dict[str, Tensor]]] | None = None

    def rehearse(
        self,
        call: ModelCall,
        hidden_states: Tensor,
        mask: Mask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        """Find out what the trunk's layers will be given, and check that of the first one.

        Args:
            call: The running call, where it is noted.
            hidden_states: The smashed data.
            mask: As the trunk is given it.
            args: Positional arguments of the first layer's call.
            kwargs: Named arguments of the first layer's call.

        Raises:
            SplitError: The trunk's layers would be given something else.
        """
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
        check_arguments(self._index, args, kwargs, call, call.rehearsed)

    def given(
        self,
        call: ModelCall,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        trunk: nn.Module,
    ) -> dict[str, dict[str, Tensor]]:
        """Return what the trunk is given beside mask and positions, by its forward's argument.

        Raises:
            SplitError: ``trunk`` takes none of it, or it may be token ids.
        """
        given: dict[str, dict[str, Tensor]] = {}
        if self.carried:
            _check_takes(trunk, LAYER_ARGUMENTS, self.carried)
            there = tensors_of(args, kwargs)
            given[LAYER_ARGUMENTS] = {place: there[place] for place in self.carried}
        if call.shared and (shared := _shared_arguments(call, trunk)):
            given[HOST_ARGUMENTS] = shared
        return given


def _shared_arguments(call: ModelCall, trunk: nn.Module) -> dict[str, Tensor]:
    """Return what the trunk's forward needs to add to the hidden states between its layers."""
    _check_takes(trunk, HOST_ARGUMENTS, tuple(call.unknown))
    shared = by_place(call.unknown)
    for place, tensor in shared.items():
        if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise SplitError(
                f"the model adds something of {place} to the hidden states between layers of the "
                "trunk, and integers, which may be token ids, do not leave the client. Choose "
                "other cut layers."
            )
    return shared


def whole_mask(mask: Mask, trunk: nn.Module) -> dict[str, Tensor]:
    """Return a mask that does not follow from padding, as an argument beside the padding mask.

    Raises:
        SplitError: ``trunk`` takes none, or the model made some of the masks alone.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return {}
    _check_takes(trunk, HOST_ARGUMENTS, ("attention_mask",))
    if isinstance(mask, Mapping) and any(part is None for part in mask.values()):
        raise SplitError(
            "with a key-value cache the trunk takes a mask for every kind of layer, or none; the "
            "model made some. Call the model, or its generate, with use_cache=False."
        )
    return by_place({"attention_mask": mask})


def _check_takes(trunk: nn.Module, argument: str, places: tuple[str, ...]) -> None:
    """Check that a trunk's forward has an argument.

    Raises:
        SplitError: It has not; ``places`` are what it would be given by it.
    """
    if argument not in argument_names(type(trunk).forward):
        raise SplitError(
            f"the trunk's layers need what this client makes ({', '.join(places)}), and "
            f"{type(trunk).__name__} takes none of it: its forward has no argument "
            f"{argument}. Use TrunkModel or RemoteTrunk, or other cut layers."
        )


def check_arguments(
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
