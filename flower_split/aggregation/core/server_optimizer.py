"""Server optimizers on ΔW: momentum in factored form, the adaptive ones on the dense matrix.

Adaptive Federated Optimization. Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett,
Keith Rush, Jakub Konečný, Sanjiv Kumar, H. Brendan McMahan. ICLR 2021, arXiv 2003.00295.
Momentum: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification. Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. 2019, arXiv 1909.06335.

The round's mean change Δ of ΔW is the pseudo-gradient. Its momentum is a sum of low-rank terms and
stays low-rank. The adaptive ones are Algorithm 2 of Reddi et al., entry by entry of ΔW::

    m ← β1 m + (1 − β1) Δ                               (m₀ = 0, without bias correction)
    v ← v + Δ²                                          (adagrad; v₀ = τ²)
    v ← v − (1 − β2) Δ² sign(v − Δ²)                    (yogi)
    v ← β2 v + (1 − β2) Δ²                              (adam)
    ΔW ← ΔW + η m / (√v + τ)

An elementwise second moment has no factors, so m and v are [out, in] matrices in fp32: 8 bytes an
entry of every adapted weight (134 MB for 4096 × 4096), and the SVD of a dense step in every round
(13 s for that weight on one CPU thread). They are for small models or a ``strategy.device`` with room.
The step is exact; ΔW is then recompressed to ``max_rank``, as after any other round.

On factors instead of ΔW none of this would mean anything once the server has changed their basis.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.aggregation.core.factors import Factors
from flower_split.aggregation.core.lowrank import LowRankSum, factors_of
from flower_split.errors import AggregationError

SERVER_OPTIMIZERS = ("none", "momentum", "adam", "yogi", "adagrad")
ADAPTIVE = ("adam", "yogi", "adagrad")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptimizer:
    """How a round's mean change becomes the server's step.

    Args:
        name: ``none`` (the change itself), ``momentum``, ``adam``, ``yogi`` or ``adagrad``.
        beta1: Decay of the momentum, β1.
        beta2: Decay of the second moment, β2; not for ``adagrad``.
        epsilon: τ, the degree of adaptivity, in units of ΔW's entries.
    """

    name: str = "none"
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Check choices and ranges.

        Raises:
            AggregationError: An option is out of range.
        """
        if self.name not in SERVER_OPTIMIZERS:
            raise AggregationError(
                f"server_optimizer must be one of {', '.join(SERVER_OPTIMIZERS)}; it is "
                f"{self.name!r}."
            )
        for label, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise AggregationError(f"{label} must be in [0, 1); it is {value!r}.")
        if not self.epsilon > 0:
            raise AggregationError(f"epsilon must be above 0; it is {self.epsilon!r}.")

    @property
    def adaptive(self) -> bool:
        """Return whether it keeps dense moments, which move even in a round without a change."""
        return self.name in ADAPTIVE

    def step(
        self, change: LowRankSum, moments: Mapping[str, Tensor], max_rank: int | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the step that Δ leads to.

        Args:
            change: Δ.
            moments: What the last call returned; empty in the first round.
            max_rank: The rank that ``momentum`` is kept at; None: no truncation.

        Returns:
            The step as P [out, R] and Q [R, in] in fp64, and the new moments.
        """
        p, q = change.product()
        if self.name == "none":
            return p, q, {}
        if self.adaptive:
            return self._adaptive_step(p @ q, moments)
        total = LowRankSum(p.shape[0], q.shape[1], device=p.device)
        total.add_product(p, q)
        if moments:
            total.add(Factors(moments["momentum.A"], moments["momentum.B"]), self.beta1)
        momentum = total.spectrum(max_rank)
        kept = factors_of(momentum, 1.0)
        new = {"momentum.A": kept.A, "momentum.B": kept.B}
        return momentum.U * momentum.S, momentum.Vh, new

    def _adaptive_step(
        self, delta: Tensor, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return Algorithm 2's step for Δ [out, in]; one side of the product is the identity."""
        square = delta.square()
        if moments:
            first, second = moments["first"].double(), moments["second"].double()
        else:
            first, second = torch.zeros_like(delta), torch.full_like(delta, self.epsilon**2)
        first = self.beta1 * first + (1 - self.beta1) * delta
        if self.name == "adagrad":
            second = second + square
        elif self.name == "yogi":
            second = second - (1 - self.beta2) * square * torch.sign(second - square)
        else:
            second = self.beta2 * second + (1 - self.beta2) * square
        step = first / (second.sqrt() + self.epsilon)
        new = {"first": first.float(), "second": second.float()}
        rows, columns = step.shape
        identity = torch.eye(min(rows, columns), dtype=step.dtype, device=step.device)
        return (identity, step, new) if rows <= columns else (step, identity, new)
