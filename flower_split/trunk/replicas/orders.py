"""What the trunk's leader asks of a follower and what comes back, beside the tensors.

These values travel on a pipe between a process and the child that it started. Tensors travel in the
process group, all of a message as one run of bytes, in the order that each message names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.split import CutLayers
from flower_split.trunk.compute.joining import Rows
from flower_split.trunk.replicas.packing import Layout


@dataclass(frozen=True, slots=True)
class Join:
    """Meet in the process group, and compute from then on."""

    folder: str  # where the processes meet
    rank: int
    size: int
    timeout: float  # seconds
    takes_mask: bool = True  # whether the model takes a padding mask


@dataclass(frozen=True, slots=True)
class Kept:
    """Which passes the leader still has; the others are forgotten before anything is computed."""

    alive: frozenset[int]
    without_graph: frozenset[int]  # their backward runs the forward again: there was no room


@dataclass(frozen=True, slots=True)
class PartHeader:
    """One slot's micro-batch."""

    slot: int
    names: tuple[str, ...]  # of its tensors
    use_cache: bool | None
    cuts: CutLayers | None


@dataclass(frozen=True, slots=True)
class ForwardOrder:
    """Compute a batch's forward. Tensors: all trainable weights if they have changed, then the parts'."""

    kept: Kept
    version: int  # of the weights
    weights: bool  # whether they come along
    parts: tuple[PartHeader, ...]
    seed_of: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class BackwardOrder:
    """Compute a batch's backward. Tensors: the gradients of the outputs, by ``denominators``."""

    kept: Kept
    passes: tuple[int, ...]
    denominators: Mapping[int, float]  # slot -> what its client divided its loss by
    layout: Layout


@dataclass(frozen=True, slots=True)
class AgainOrder:
    """Compute what some slots alone give to a pass that has had its backward."""

    kept: Kept
    number: int  # the pass
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class CallOrder:
    """Compute one call's forward with the others. Tensors: the weights if they have changed, the inputs."""

    number: int  # of the call
    alive: frozenset[int]  # the calls whose backward may still come; the others are forgotten
    weights: bool  # whether the trainable weights come along, whole
    graph: bool  # whether the backward may come
    training: bool
    seed: int  # of torch's random state
    use_cache: bool | None
    names: tuple[str, ...]  # of the inputs, the hidden states first
    layout: Layout


@dataclass(frozen=True, slots=True)
class CallBackOrder:
    """Compute one call's backward with the others. Tensors: the gradient of its output."""

    number: int  # of the call
    layout: Layout


BatchOrder = ForwardOrder | BackwardOrder | AgainOrder
Order = BatchOrder | CallOrder | CallBackOrder


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a slot has no result."""

    reason: RefusalReason | None  # of a refusal
    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Describe ``error``."""
        if isinstance(error, TrunkRefused):
            return cls(error.reason, str(error))
        return cls(None, f"{type(error).__name__}: {error}")

    def error(self, where: str) -> Exception:
        """Return the error again; one that is no refusal says where it was raised."""
        if self.reason is not None:
            return TrunkRefused(self.reason, self.text)
        return RuntimeError(f"{where}: {self.text}")


@dataclass(frozen=True, slots=True)
class PassHeader:
    """A pass that a follower has made."""

    number: int
    cuts: CutLayers | None
    rows: tuple[Rows, ...]
    shape: tuple[int, ...]  # of its hidden states
    num_bytes: int  # that its graph keeps
    has_graph: bool  # False: there was no room on its device


@dataclass(frozen=True, slots=True)
class GradientHeader:
    """What a pass gives to the window; its tensors are the gradients that are there."""

    cuts: CutLayers | None
    unit: float
    present: tuple[bool, ...]  # by parameter


@dataclass(frozen=True, slots=True)
class Ready:
    """The layers are loaded."""

    where: str  # the device
    num_parameters: int  # that train


@dataclass(frozen=True, slots=True)
class Forwards:
    """A batch's forward. Tensors: the outputs, by ``slots``."""

    passes: tuple[PassHeader, ...]
    slots: tuple[int, ...]
    failures: Mapping[int, Failure]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Backwards:
    """A batch's backward. Tensors: the smashed gradients, by ``slots``, then the parameters'."""

    gradients: tuple[GradientHeader, ...]
    slots: tuple[int, ...]
    failures: Mapping[int, Failure]
    norms_squared: Mapping[int, float]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Called:
    """A call's forward is done; the leader has the same output."""


@dataclass(frozen=True, slots=True)
class CalledBack:
    """A call's backward is done. Tensors: the gradients of this process's shards, by ``present``."""

    present: tuple[bool, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Broken:
    """An order failed as a whole."""

    text: str


Reply = Ready | Forwards | Backwards | Called | CalledBack | Broken
