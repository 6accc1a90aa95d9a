"""LoRA-FAIR: average A and B, then correct B towards the exact mean of ΔW.

LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement. Jieming Bian,
Lei Wang, Letian Zhang, Jie Xu. ICCV 2025, arXiv 2411.14961, equation 8.

The correction minimises ``1 − cos(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖_F``, where ΔW = Σ w BA, the angle is
that of the flattened matrices, and B is written at the scale of the initial adapter. Where the paper
takes steps of SGD from ΔB = 0, the minimum itself is computed here.

With G = ĀĀᵀ [r, r] and M = ΔW Āᵀ [out, r] every stationary point other than ΔB = 0 has the form
``B̄ + ΔB = (B̄ + αM)(I + βG)⁻¹``, so that in the eigenvectors of G the objective is a function of the
two numbers α and β and of r inner products; no [out, in] matrix appears.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share, check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.methods.means import mean_a, mean_b
from flower_split.errors import AggregationError

_MAX_STEPS = 300  # of L-BFGS on two numbers; it takes about 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAFair(Aggregator):
    """A ← Ā, B ← B̄ + ΔB.

    Args:
        penalty: λ, the weight of ‖ΔB‖_F; 0: the limit of small λ, which is the projection of the
            exact mean on the rows of Ā, as long as is nearest to B̄.
    """

    name: ClassVar[str] = "lora-fair"
    paper: ClassVar[str] = "2411.14961"
    exactness: ClassVar[str] = "direction of the mean, as far as the rows of the mean A allow"
    deviation: ClassVar[str] = "the objective's minimum instead of some steps of SGD towards it"

    penalty: float = 0.01

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        Aggregator.__post_init__(self)
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise AggregationError(
                f"lora-fair's penalty must be finite and at least 0; it is {self.penalty!r}."
            )

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        a, b = mean_a(clients), mean_b(clients, state.factors.scale)
        corrected = _corrected(a, b, _exact_mean(state, clients), self.penalty)
        factors = Factors(a, corrected, state.factors.scale)
        return AggregationResult(
            replace(state, factors=factors, server_round=state.server_round + 1)
        )


def _exact_mean(state: State, clients: Sequence[Share]) -> tuple[Tensor, Tensor]:
    """Return Σ w s B A at the scale of the state, as P [out, R] and Q [R, in] in fp64."""
    total = LowRankSum(state.out_features, state.in_features, device=state.factors.A.device)
    for client in clients:
        total.add(client.returned, client.share / state.factors.scale)
    return total.product()


def _corrected(a: Tensor, b: Tensor, exact: tuple[Tensor, Tensor], penalty: float) -> Tensor:
    """Return B̄ + ΔB, [out, r] in fp64, at the minimum that descent from ΔB = 0 leads to.

    Args:
        a: Ā, [r, in], fp64.
        b: B̄, [out, r], fp64.
        exact: ΔW as two factors.
        penalty: λ.
    """
    left, right = exact
    length = float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(a @ a.T)
    usable = values > values[-1:] * 1e-12  # directions that Ā does not have cannot be corrected
    values = torch.where(usable, values, torch.zeros_like(values))
    mean, wanted = b @ vectors, torch.where(usable, left @ (right @ a.T) @ vectors, 0.0)
    terms = _Terms(
        values.cpu(),
        mean.square().sum(dim=0).cpu(),
        (mean * wanted).sum(dim=0).cpu(),
        wanted.square().sum(dim=0).cpu(),
        length,
    )
    if length == 0 or terms.norm_of_mean == 0:  # an angle to nothing
        return b
    projected = torch.where(usable, wanted / torch.where(usable, values, 1.0), 0.0)
    nearest = float((mean * projected).sum() / projected.square().sum().clamp_min(1e-300))
    if penalty == 0:
        return torch.where(usable, projected * nearest, mean) @ vectors.T
    # Where the angle's slope is below λ, any ΔB costs more than it gains.
    slope = wanted / terms.norm_of_mean - mean * values * (terms.inner / terms.norm_of_mean**3)
    if float(slope.norm()) / length <= penalty or nearest <= 0:
        return b
    distance = float((projected * nearest - mean).norm())
    alpha, beta = terms.minimum(penalty, nearest, distance)
    return ((mean + alpha * wanted) / (1 + beta * values)) @ vectors.T


@dataclass(frozen=True, slots=True)
class _Terms:
    """The objective's coefficients in the eigenvectors of G; each [r] in fp64 on the CPU.

    Args:
        values: Eigenvalues of G.
        bb: Squared lengths of the columns of B̄.
        bm: Inner products of the columns of B̄ and M.
        mm: Squared lengths of the columns of M.
        length: ‖ΔW‖_F.
    """

    values: Tensor
    bb: Tensor
    bm: Tensor
    mm: Tensor
    length: float

    @property
    def inner(self) -> float:
        """Return ⟨ΔW, B̄Ā⟩."""
        return float(self.bm.sum())

    @property
    def norm_of_mean(self) -> float:
        """Return ‖B̄Ā‖_F."""
        return float((self.values * self.bb).sum().sqrt())

    def objective(self, alpha: Tensor, beta: Tensor, penalty: float) -> Tensor:
        """Return the objective at (B̄ + αM)(I + βG)⁻¹."""
        shrink = 1 + beta * self.values
        inner = ((self.bm + alpha * self.mm) / shrink).sum()
        square = self.bb + 2 * alpha * self.bm + alpha.square() * self.mm
        norm = (self.values * square / shrink.square()).sum().sqrt()
        pull = beta * self.values
        moved = alpha.square() * self.mm - 2 * alpha * pull * self.bm + pull.square() * self.bb
        distance = (moved / shrink.square()).sum().clamp_min(1e-300).sqrt()
        return 1 - inner / (self.length * norm) + penalty * distance

    def minimum(self, penalty: float, nearest: float, distance: float) -> tuple[float, float]:
        """Return the α and β of the minimum.

        Args:
            penalty: λ.
            nearest: The multiple of the projection of ΔW on the rows of Ā that is nearest to B̄.
            distance: How near; with it the search begins at the solution for small λ.
        """
        norm = nearest * float((self.mm / self.values.clamp_min(1e-300)).sum().sqrt())
        alpha = max(distance, 1e-12) / (penalty * norm * self.length)
        start = [math.log(alpha), math.log(alpha / nearest)]
        point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [point],
            max_iter=_MAX_STEPS,
            tolerance_grad=1e-13,
            tolerance_change=1e-15,
            history_size=8,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            value = self.objective(point[0].exp(), point[1].exp(), penalty)
            (point.grad,) = torch.autograd.grad(value, [point])
            return float(value.detach())

        with torch.enable_grad():
            search.step(closure)  # type: ignore[no-untyped-call]
        alpha, beta = point.detach().exp().tolist()
        return alpha, beta
