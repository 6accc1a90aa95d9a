"""A call of the trunk: what it is given, and how the model's own forward runs its layers.

The whole model's forward is called with the smashed data as its input embeddings, so that it prepares
its layers' inputs itself. A hook on the first trunk layer puts the smashed data in the place of whatever
the prologue made; a hook on the last one takes its output and ends the forward.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.layer_arguments import with_tensors
from flower_split.split.structure.stand_in import hidden_states_of, take_hidden_states

# A padding mask ``[batch, seq]``; or, where layers need another one (images that see themselves whole),
# the mask that the model made, ``[batch or 1, heads or 1, seq, seq]``; or one of those per kind of layer.
Mask = Tensor | Mapping[str, Tensor | None] | None

_MASK, _POSITIONS = "attention_mask", "position_ids"
_LAYER, _HOST = "layer_argument", "host_argument"


@dataclass(frozen=True, slots=True)
class TrunkInputs:
    """The arguments of a trunk's call beside the hidden states, as tensors by name for a network.

    Names: ``attention_mask`` (the padding mask ``[batch, seq]``, or the whole mask ``[batch or 1,
    heads or 1, seq, seq]``), ``attention_mask/KIND`` (one whole mask per kind of layer; an empty tensor
    where that kind needs none), ``position_ids`` (``[batch or 1, seq]``, with an axis before them where
    the model has several), ``layer_argument/PLACE`` and ``host_argument/PLACE``
    (:mod:`flower_split.split.structure.layer_arguments`): see ``TrunkModel.forward``.
    """

    attention_mask: Mask = None
    position_ids: Tensor | None = None
    layer_arguments: Mapping[str, Tensor] = field(default_factory=dict)
    host_arguments: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name.

        Raises:
            SplitError: A layer's or a host's argument is made by weights that are trained: a network
                returns no gradient of it.
        """
        places = {**self.layer_arguments, **self.host_arguments}
        trained = [place for place, tensor in places.items() if tensor.requires_grad]
        if trained:
            raise SplitError(
                f"the client trains weights that make a tensor for the trunk's layers (argument "
                f"{', '.join(trained)}, such as a relative position bias or features of images), and "
                "a remote trunk returns no gradient of that. Freeze those weights: adapters on the "
                "layers' linear modules leave them frozen."
            )
        tensors: dict[str, Tensor] = {}
        if isinstance(self.attention_mask, Mapping):
            for kind, mask in self.attention_mask.items():
                nothing = torch.empty(0, dtype=torch.bool)
                tensors[f"{_MASK}/{kind}"] = nothing if mask is None else mask
        elif self.attention_mask is not None:
            tensors[_MASK] = self.attention_mask
        if self.position_ids is not None:
            tensors[_POSITIONS] = self.position_ids
        for kind, arguments in ((_LAYER, self.layer_arguments), (_HOST, self.host_arguments)):
            tensors.update({f"{kind}/{place}": tensor for place, tensor in arguments.items()})
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "TrunkInputs":
        """Return the arguments that :meth:`named` gave these tensors for, on ``device``."""
        masks: dict[str, Tensor | None] = {}
        arguments: dict[str, dict[str, Tensor]] = {_LAYER: {}, _HOST: {}}
        for name, tensor in tensors.items():
            head, _, rest = name.partition("/")
            if head == _MASK and rest:
                masks[rest] = tensor.to(device) if tensor.numel() else None
            elif head in arguments:
                arguments[head][rest] = tensor.to(device)
        mask, positions = tensors.get(_MASK), tensors.get(_POSITIONS)
        return cls(
            masks if masks else (None if mask is None else mask.to(device)),
            None if positions is None else positions.to(device),
            arguments[_LAYER],
            arguments[_HOST],
        )


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


@functools.lru_cache(maxsize=64)
def _is_required(forward: Callable[..., object], name: str) -> bool:
    return inspect.signature(forward).parameters[name].default is inspect.Parameter.empty


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
