"""Where a running forward of the trunk's host begins and ends: at the trunk's first and last layer.

The host's forward is the model's own. A hook on the first trunk layer puts the smashed data in the
place of whatever the prologue made; a hook on the last one takes its output and ends the forward.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flower_split.split.structure.layer_arguments import with_tensors
from flower_split.split.structure.stand_in import hidden_states_of, take_hidden_states


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


class TrunkInput(BaseException):
    """Ends a probing forward at the trunk's first layer."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class TrunkOutput(BaseException):
    """Ends a forward at the trunk's last layer. Not an Exception: no model may swallow it."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


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
