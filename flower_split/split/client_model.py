"""The client's model: the ordinary model class with the trunk called in place of its layers.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.cuts import CutLayers
from flower_split.split.stack import LayerStack
from flower_split.split.stand_in import LayerOutput, StandIn, take_hidden_states
from flower_split.split.trunk_model import TrunkModel

# Arguments of the model that no layer computes with, or that the trunk is given or builds itself.
_KNOWN_ARGUMENTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "cache_position",
        "labels",
        "num_items_in_batch",
    }
)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the trunk needs of the running call of the module that owns the layers."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    use_cache: bool


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


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
        trunk: The module that is called.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, trunk: nn.Module) -> None:
        super().__init__(layer, output)
        self._trunk = (trunk,)

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
        inputs = {"attention_mask": call.attention_mask, "position_ids": call.position_ids}
        if isinstance(self.trunk, TrunkModel):
            return self.output.wrap(self.trunk(hidden_states, **inputs, use_cache=call.use_cache))
        return self.output.wrap(self.trunk(hidden_states, **inputs))


@functools.lru_cache(maxsize=64)
def _signature(forward: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(forward)


def _note_call(host: PreTrainedModel, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Before the module that owns the layers runs: keep its mask and positions for the trunk."""
    bound = _signature(type(host).forward).bind(host, *args, **kwargs)
    named = dict(bound.arguments)
    named.update(named.pop("kwargs", {}))
    named.pop("self", None)
    cache = named.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length() > 0:
        raise SplitError(
            "a split model keeps no key-value cache. Call it, or its generate, with "
            "use_cache=False."
        )
    for name, value in named.items():
        if isinstance(value, Tensor) and name not in _KNOWN_ARGUMENTS:
            raise SplitError(
                f"the model was called with {name}, which the trunk does not receive, so its "
                f"layers would compute something else. Call the split model without {name}."
            )
    mask = named.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise SplitError(
            "a split model takes a padding mask of shape [batch, seq]; it was given "
            f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
        )
    use_cache = named.get("use_cache")
    if use_cache is None:
        use_cache = getattr(host.config, "use_cache", False)
    _call.set(_Call(mask, named.get("position_ids"), bool(use_cache)))


def _forget_call(host: nn.Module, args: tuple[object, ...], output: object) -> None:
    _call.set(None)


def client_replacements(
    root: nn.Module, stack: LayerStack, cuts: CutLayers, output: LayerOutput, trunk: nn.Module
) -> dict[str, nn.Module]:
    """What to put where, so that ``root`` keeps the bottom's and the top's weights alone.

    Returns:
        Dotted name in ``root`` -> replacement.
    """
    layers = stack.layers(root)
    replacements: dict[str, nn.Module] = {
        stack.layer_path(index): StandIn(layers[index], output)
        for index in range(cuts.first + 1, cuts.second)
    }
    replacements[stack.layer_path(cuts.first)] = TrunkSlot(layers[cuts.first], output, trunk)
    return replacements


def wire_client(client: PreTrainedModel, stack: LayerStack) -> None:
    """Make ``client``, whose layers are replaced, hand its mask and positions to the trunk."""
    host = client.get_submodule(stack.host_path)
    host.register_forward_pre_hook(_note_call, with_kwargs=True)
    host.register_forward_hook(_forget_call, always_call=True)
    # generate() recomputes the prefix: the trunk keeps no key-value cache between calls.
    if getattr(client, "generation_config", None) is not None:
        client.generation_config.use_cache = False


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
