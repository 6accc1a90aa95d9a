"""What a round knows of one client: its session, and the end of its step."""

import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from flower_split.protocol.values import FinishResult
from flower_split.split import CutLayers


def new_epoch() -> int:
    """Return the number of a trunk's process: random, and always of as many bytes on the wire."""
    return 1 << 62 | secrets.randbits(62)


@dataclass(frozen=True, slots=True)
class Session:
    """A client of the open round."""

    id: str
    slot: int
    planned_steps: int
    cuts: CutLayers | None = None  # the client's own; None: the trunk's


@dataclass(frozen=True, slots=True, eq=False)
class StepEnd:
    """One client's FinishStep in the open window."""

    grad_norm_squared: float  # L2, of its own gradient
    gradients: Mapping[str, Tensor]  # its own, where the round shares them
    future: "Future[FinishResult]"  # of the reply, when the window has stepped
    arrived: float  # on the engine's clock
