"""The values that aggregation works on: LoRA factors, a client's update, the server's state.

Shapes, throughout the package: ``A`` is [r, in], ``B`` is [out, r], and a module's weight changes
by ΔW = scale · B @ A, [out, in]. All tensors are fp32; anything computed on the way is fp64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's LoRA: ΔW = scale · B @ A.

    Floating tensors of another precision are taken and become fp32. Shapes and values are checked
    where factors are used, so that the error can name the client.

    Args:
        A: [r, in].
        B: [out, r].
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA; it is not in any state dict, so it
            travels beside the tensors.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Detach, and bring floating tensors to fp32."""
        for name in ("A", "B"):
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor):
                tensor = tensor.detach()
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    tensor = tensor.to(torch.float32)
                object.__setattr__(self, name, tensor)

    def to(self, device: torch.device) -> "Factors":
        """Return the same factors on a device; no copy if they are there."""
        return Factors(self.A.to(device), self.B.to(device), self.scale)

    @property
    def rank(self) -> int:
        """Return the number of rows of A."""
        return int(self.A.shape[0])

    @property
    def out_features(self) -> int:
        """Return the number of rows of ΔW."""
        return int(self.B.shape[0])

    @property
    def in_features(self) -> int:
        """Return the number of columns of ΔW."""
        return int(self.A.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one client did with one module in one round.

    Args:
        client_id: Names the client in errors, and orders the sums.
        received: The factors the server sent to this client.
        returned: The factors the client sent back.
        weight: Non-negative; only its share of all weights matters.
    """

    client_id: str | int
    received: Factors
    returned: Factors
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What the server keeps of one module between rounds.

    Args:
        factors: The global ΔW.
        basis: A as ``init`` got it, [r, in]: its rows fill ranks that ΔW does not use yet, and its
            number of rows is the default rank of ``distribute``.
        scale: The scale ``init`` got: the default scale of ``distribute``.
        server_round: Rounds aggregated so far.
        extra: Further tensors of a method (moments, frozen bases), by name.
    """

    factors: Factors
    basis: Tensor
    scale: float
    server_round: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def out_features(self) -> int:
        """Return the number of rows of ΔW."""
        return self.factors.out_features

    @property
    def in_features(self) -> int:
        """Return the number of columns of ΔW."""
        return int(self.basis.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class AggregationResult:
    """The outcome of one round for one module.

    Args:
        state: The server's next state.
        residual: What every client adds to its frozen base weight this round, for the methods that
            change it; None for the others. The round's merged update is
            ``delta(state)`` plus this.
    """

    state: State
    residual: Factors | None = None
