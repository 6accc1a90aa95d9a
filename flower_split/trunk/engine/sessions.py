"""What a round knows of one client: whether it belongs, its session, and the end of its step."""

import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.parties.fingerprint import differences, differing_fields, is_of_training
from flower_split.parties.protocol_versions import protocol_problem
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


def check_fingerprint(
    mine: Mapping[str, str],
    theirs: Mapping[str, str],
    slot: int,
    *,
    own_cuts: bool = False,
    evaluate: bool = False,
) -> None:
    """Refuse a client that does not hold parts of the same model, naming the fields that differ.

    Args:
        mine: The trunk's.
        theirs: The client's.
        slot: The client's.
        own_cuts: The client names its own cut layers, which are checked elsewhere: the run's need
            not be the trunk's.
        evaluate: It only evaluates: how the trunk trains does not count.
    """
    if problem := protocol_problem(mine, theirs, ("the trunk", f"the client of slot {slot}")):
        raise TrunkRefused(RefusalReason.FINGERPRINT_MISMATCH, problem)
    differing = [
        name
        for name in differing_fields(mine, theirs, own_cuts=own_cuts)
        if not (evaluate and is_of_training(name))
    ]
    if differing:
        raise TrunkRefused(
            RefusalReason.FINGERPRINT_MISMATCH,
            f"slot {slot} and the trunk do not hold parts of the same model, trained in the same way: "
            "they differ in "
            f"{differences(mine, theirs, differing, labels=('trunk', 'client'))}. Give both the same "
            "run config and the same checkpoint.",
        )
