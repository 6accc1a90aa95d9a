"""The trunk's forward without its layers: what they would be given beside the hidden states.

The trunk is given a padding mask and position ids, and lets the model's own forward make of them
what its layers need. A client that wants to know whether that is what its own forward made runs
this, on its own machine: the model with stand-ins for all layers and no weights.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import (
    LayerOutput,
    Mask,
    StandIn,
    host_inputs,
    take_hidden_states,
)
from flower_split.split.structure.layer_arguments import tensors_of
from flower_split.split.structure.probe import same_bits
from flower_split.split.structure.stack import LayerStack, embedding_width
from flower_split.split.trunk_side.carve import drop_outer_weights, trunk_replacements


@dataclass(slots=True)
class Rehearsed:
    """What a rehearsal noted.

    Args:
        arguments: Index of the layer -> place -> tensor: what the trunk's layers were given.
        changes: Whether the forward changed the hidden states between two of them.
        passing: The hidden states that the last of them was given.
    """

    arguments: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    changes: bool = False
    passing: Tensor | None = None


class Rehearsal:
    """A model's forward up to the end of the trunk, with a stand-in for every layer.

    Args:
        client: The client model, whose trunk layers are replaced already; it is not changed.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs.
        constants: The embeddings that the trunk keeps.
    """

    def __init__(
        self,
        client: PreTrainedModel,
        stack: LayerStack,
        cuts: CutLayers,
        output: LayerOutput,
        constants: frozenset[str],
    ) -> None:
        replacements = trunk_replacements(client, stack, cuts, output, constants)
        for index in range(cuts.first, cuts.second):
            layer = stack.layers(client)[index]
            replacements[stack.layer_path(index)] = StandIn(layer, output)
        # A trunk has weights, of which a forward may ask the dtype; here there are none left.
        weight = next(client.parameters()).detach().new_empty(0)
        last = replacements[stack.layer_path(cuts.second - 1)]
        last.register_parameter("weight_of_trunk", nn.Parameter(weight, requires_grad=False))
        memo: dict[int, object] = {
            id(client.get_submodule(path)): module for path, module in replacements.items()
        }
        self._root: nn.Module = copy.deepcopy(client, memo).train(False)
        drop_outer_weights(self._root, stack)
        self._host = self._root.get_submodule(stack.host_path)
        self._width = embedding_width(client)
        for index in range(cuts.first, cuts.second):
            hook = functools.partial(_note, index)
            stack.layers(self._root)[index].register_forward_pre_hook(hook, with_kwargs=True)
        last.register_forward_pre_hook(_stop)

    def arguments(
        self,
        smashed: Tensor,
        mask: Mask,
        position_ids: Tensor | None,
        use_cache: bool | None,
        host_arguments: Mapping[str, object] | None = None,
    ) -> Rehearsed:
        """Return what the trunk's layers would be given beside the hidden states.

        Args:
            smashed: Smashed data whose shape, dtype and device count; its values do not.
            mask: As the trunk is given it.
            position_ids: As the trunk is given them.
            use_cache: As the trunk is given it.
            host_arguments: Other arguments of the module that owns the layers.

        Raises:
            SplitError: The model does not run like that.
        """
        hidden_states = smashed.new_zeros(*smashed.shape[:2], self._width)
        inputs = host_inputs(self._host, hidden_states, self._width, mask, position_ids, use_cache)
        inputs.update(host_arguments or {})
        rehearsed = Rehearsed()

        def run() -> None:  # in a context of its own, which a forward that is ended leaves as it is
            _rehearsed.set(rehearsed)
            with torch.no_grad(), contextlib.suppress(_Stop):
                self._host(**inputs)

        try:
            contextvars.copy_context().run(run)
        except Exception as error:
            raise SplitError(
                f"{type(self._root).__name__} does not run from hidden states, the padding mask "
                f"and the position ids alone: {type(error).__name__}: {error}"
            ) from error
        return rehearsed

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the buffers along with the client's weights."""
        self._root._apply(fn)  # type: ignore[no-untyped-call]


class _Stop(BaseException):
    """Ends a forward; not an Exception, so that no model swallows it."""


# Where the rehearsal that is running in this context notes the layers' arguments.
_rehearsed: ContextVar[Rehearsed] = ContextVar("rehearsed")


def _note(
    index: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    rehearsed, hidden_states = _rehearsed.get(), take_hidden_states(args, kwargs)
    before = rehearsed.passing
    if before is not None and before is not hidden_states:
        rehearsed.changes |= not same_bits(before, hidden_states)
    rehearsed.passing = hidden_states
    rehearsed.arguments[index] = tensors_of(args, kwargs)


def _stop(module: nn.Module, args: tuple[object, ...]) -> None:
    raise _Stop
