"""The trainable state of the trunk at one version: in memory, and as the tensors of a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.training.optimizers import load_optimizer_tensors, optimizer_tensors

_OPTIMIZER = "optimizer/"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The trainable state at one version; restoring it undoes every step since."""

    version: int
    parameters: list[Tensor]
    optimizer: dict[str, Any]


def checkpoint_tensors(
    named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    """Return parameters and optimizer state, bit for bit, on the CPU.

    Args:
        named: The trainable parameters, by the trunk's names.
        optimizer: Theirs; None: there is none.

    Returns:
        ``parameter/NAME`` and ``optimizer/NAME/KEY``.
    """
    state = {} if optimizer is None else optimizer_tensors(named, optimizer)
    parameters = {f"parameter/{name}": p.detach().cpu().contiguous() for name, p in named}
    return parameters | {f"{_OPTIMIZER}{name}": value for name, value in state.items()}


def load_checkpoint_tensors(
    named: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Go to the state of :func:`checkpoint_tensors`.

    Args:
        named: The trainable parameters, by the trunk's names; written to.
        optimizer: Theirs; None: there is none.
        tensors: The state.

    Raises:
        TrunkRefused: It is of other parameters (NO_CHECKPOINT); nothing has changed.
    """
    wanted = {f"parameter/{name}": parameter.shape for name, parameter in named}
    found = {name: value.shape for name, value in tensors.items() if name in wanted}
    if wanted != found:
        differing = sorted(name for name in wanted if wanted[name] != found.get(name))
        raise TrunkRefused(
            RefusalReason.NO_CHECKPOINT,
            f"the checkpoint is of another trunk: it differs in {', '.join(differing[:4])}. "
            "Resume with the configuration that the run began with.",
        )
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(tensors[f"parameter/{name}"])
    if optimizer is not None:
        state = {
            name.removeprefix(_OPTIMIZER): value
            for name, value in tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        load_optimizer_tensors(named, optimizer, state)
