"""A model's own forward around a trunk: what it is given, which layers stand in, where the trunk is.

A trunk runs the whole model's forward with the smashed data as its input embeddings, so that it prepares
its layers' inputs itself. A hook on the first trunk layer puts the smashed data in the place of whatever
the prologue made; a hook on the last one takes its output and ends the forward. Where another party's
layer would be, on either side, a :class:`StandIn` is, so that indices and names never change.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flower_split.errors import SplitError
from flower_split.split.structure.kv_cache import enter_place_holder, find_cache
from flower_split.split.structure.layer_arguments import tensors_of, with_tensors
from flower_split.split.structure.place_holders import plain_attributes

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What a model's forward calls its cache: transformers' name from 5.24 on, and the one before."""

# A padding mask ``[batch, seq]``; or, where layers need another one (images that see themselves whole),
# the mask that the model made, ``[batch or 1, heads or 1, seq, seq]``; or one of those per kind of layer.
Mask = Tensor | Mapping[str, Tensor | None] | None


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
        width: Width of the input embeddings.
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


def cache_argument(forward: Callable[..., object]) -> str:
    """Return the name under which a model's forward takes its cache; empty: it takes none."""
    names = argument_names(forward)
    return next((name for name in CACHE_ARGUMENTS if name in names), "")


@functools.lru_cache(maxsize=64)
def _is_required(forward: Callable[..., object], name: str) -> bool:
    return inspect.signature(forward).parameters[name].default is inspect.Parameter.empty


class LayerOutput:
    """What a family's layers return: the hidden states alone, or first in a tuple.

    Args:
        length: Number of entries of the tuple; None if a layer returns a bare tensor.

    Attributes:
        handed_on: Entry of the tuple -> place of the argument that a layer hands on to the next
            one in it, such as a position bias that the first layer makes for all.
    """

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self.handed_on: dict[int, str] = {}

    def learn(self, output: object) -> None:
        """Take the form of a real layer's output."""
        self.length = len(output) if isinstance(output, (tuple, list)) else None

    def learn_handed_on(self, output: object, following: Mapping[str, Tensor]) -> None:
        """See which entries of a real layer's output the layer after it is given.

        Args:
            output: What the layer returned.
            following: The tensors among the next layer's arguments, by place.
        """
        if isinstance(output, (tuple, list)):
            for entry, value in enumerate(output[1:], start=1):
                for place, tensor in following.items():
                    if tensor is value:
                        self.handed_on[entry] = place

    def wrap(
        self, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Return ``hidden_states`` in the family's form; other entries are handed on, or None.

        Args:
            hidden_states: To be returned.
            args: Positional arguments of the layer's call.
            kwargs: Named arguments of the layer's call.
        """
        if self.length is None:
            return hidden_states
        given = tensors_of(args, kwargs) if self.handed_on else {}
        others = (self.handed_on.get(entry, "") for entry in range(1, self.length))
        return (hidden_states, *[given.get(place) for place in others])


def hidden_states_of(output: object) -> Tensor:
    """Return the hidden states in a layer's output.

    Raises:
        SplitError: The output is neither a tensor nor a tuple that begins with one.
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise SplitError(
            f"a layer returned {type(output).__name__} where a tensor of hidden states, or a "
            "tuple that begins with one, was expected. This family cannot be cut between layers."
        )
    return first


def take_hidden_states(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """Return the hidden states among the arguments of a layer's call: the first, or by name."""
    return hidden_states_of(args[0] if args else kwargs.get("hidden_states"))


class StandIn(nn.Module):
    """Stands where another party's layer is, and passes the hidden states through.

    It keeps the plain attributes of the layer and of its submodules (``attention_type`` and the
    like), because a model's forward may read them. It has no parameters and no submodules.

    Args:
        layer: The layer that it replaces; nothing of its weights is kept.
        output: The form of the family's layer outputs, shared by all stand-ins of a model.
        index: The layer's index in the model, if it is to enter positions into key-value caches.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int | None = None) -> None:
        super().__init__()
        self._layer_class: type[nn.Module] = type(layer)
        self._copied = dict(vars(plain_attributes(layer)))
        if isinstance(layer, StandIn):  # of a layer that is replaced already
            self._layer_class, self._copied = layer._layer_class, layer._copied
        self.__dict__.update(self._copied)
        self._layer_output = output
        self._layer_index = index

    def __getattr__(self, name: str) -> Any:
        """Return a class attribute of the replaced layer; methods are not carried over."""
        with contextlib.suppress(AttributeError):
            return super().__getattr__(name)
        value = getattr(self.__dict__.get("_layer_class", object), name)
        if name == "gradient_checkpointing" or callable(value):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first argument, in the form of the family's layer outputs."""
        hidden_states = take_hidden_states(args, kwargs)
        # With autograd no call goes on with a cache, so there is nothing to keep count of.
        counting = self._layer_index is not None and not torch.is_grad_enabled()
        cache = find_cache(args, kwargs) if counting else None
        if cache is not None and self._layer_index is not None:
            enter_place_holder(cache, self._layer_index, hidden_states)
        return self._layer_output.wrap(hidden_states, args, kwargs)


@dataclass(frozen=True, slots=True)
class Smashed:
    """What the trunk's layers are given, and which of them are first and last."""

    hidden_states: Tensor
    first: nn.Module
    last: nn.Module
    layer_arguments: Mapping[str, Tensor]  # that the client's forward made, by place
    random_state: list[Tensor] | None  # of the CPU, and of the GPU if there is one


# What the trunk forward that is running in this context begins with.
running: ContextVar[Smashed | None] = ContextVar("smashed", default=None)
# Whether that forward only finds out what reaches the first trunk layer.
probing: ContextVar[bool] = ContextVar("probing", default=False)


@dataclass(slots=True, eq=False)
class TrunkInput(BaseException):
    """Ends a probing forward at the trunk's first layer."""

    hidden_states: Tensor


@dataclass(slots=True, eq=False)
class TrunkOutput(BaseException):
    """Ends a forward at the trunk's last layer. Not an Exception: no model may swallow it."""

    hidden_states: Tensor


def enter_trunk(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Let the smashed data of the running call go into a trunk's first layer."""
    smashed = running.get()
    if probing.get():
        raise TrunkInput(take_hidden_states(args, kwargs))
    if smashed is None or smashed.first is not module:
        return None
    if smashed.random_state is not None:
        _restore_random_state(smashed.random_state, smashed.hidden_states.device)
    if args:
        return (smashed.hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": smashed.hidden_states}


def give_arguments(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Let the arguments that came with the smashed data go into every layer of a trunk."""
    smashed = running.get()
    if smashed is None or not smashed.layer_arguments:
        return None
    return with_tensors(args, kwargs, smashed.layer_arguments)


def random_state_of(device: torch.device) -> list[Tensor]:
    """Return the state of torch's generators that a computation on ``device`` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def leave_trunk(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    """End the running call after a trunk's last layer."""
    smashed = running.get()
    if smashed is not None and smashed.last is module:
        # Raised without a name here: its traceback would keep the frame, and the frame the tensors.
        raise TrunkOutput(hidden_states_of(output))
