"""Server optimizers on ΔW, in factored form.

Adaptive Federated Optimization. Sashank J. Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett,
Keith Rush, Jakub Konečný, Sanjiv Kumar, H. Brendan McMahan. ICLR 2021, arXiv 2003.00295.
Momentum: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification. Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown. 2019, arXiv 1909.06335.

The round's mean change Δ of ΔW is the pseudo-gradient. Its momentum is a sum of low-rank terms and
stays low-rank. An elementwise second moment v would be an [out, in] matrix, so it is kept by its row
and column means, v ≈ rows · columns / mean(rows), as Adafactor does (Noam Shazeer, Mitchell Stern,
ICML 2018, arXiv 1804.04235): dividing by √v is then a scaling of rows and columns, which leaves a
product of factors a product of factors.

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
        beta1: Decay of the momentum.
        beta2: Decay of the second moment; not for ``adagrad``.
        epsilon: Smallest root of the second moment, in units of ΔW's entries.
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

    def step(
        self, change: LowRankSum, moments: Mapping[str, Tensor], max_rank: int | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The step that Δ leads to.

        Args:
            change: Δ.
            moments: What the last call returned; empty in the first round.
            max_rank: The rank the momentum is kept at; None: no truncation.

        Returns:
            The step as P [out, R] and Q [R, in] in fp64, and the new moments.
        """
        p, q = change.product()
        if self.name == "none":
            return p, q, {}
        total = LowRankSum(p.shape[0], q.shape[1], device=p.device)
        total.add_product(p, q, 1 - self.beta1 if self.name in ADAPTIVE else 1.0)
        if moments:
            total.add(Factors(moments["momentum.A"], moments["momentum.B"]), self.beta1)
        momentum = total.spectrum(max_rank)
        kept = factors_of(momentum, 1.0)
        new = {"momentum.A": kept.A, "momentum.B": kept.B}
        left, right = momentum.U * momentum.S, momentum.Vh
        if self.name not in ADAPTIVE:
            return left, right, new
        rows, columns = self._second_moment(p, q, moments)
        new |= {"second.rows": rows, "second.columns": columns}
        left = left * (rows.mean().sqrt() / rows.sqrt())[:, None]
        return left, right / columns.sqrt(), new

    def _second_moment(
        self, p: Tensor, q: Tensor, moments: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Row and column means of the running Δ² + ε², [out] and [in] in fp64."""
        floor = self.epsilon**2
        # The squared length of row i of P Q is p_i (Q Qᵀ) p_iᵀ: [R, R] is the largest matrix here.
        by_row = ((p @ (q @ q.T)) * p).sum(dim=1).clamp_min(0) / q.shape[1] + floor
        by_column = (((p.T @ p) @ q) * q).sum(dim=0).clamp_min(0) / p.shape[0] + floor
        return (
            self._moved(moments.get("second.rows"), by_row),
            self._moved(moments.get("second.columns"), by_column),
        )

    def _moved(self, old: Tensor | None, square: Tensor) -> Tensor:
        if old is None:
            old = torch.full_like(square, self.epsilon**2)
        if self.name == "adagrad":
            return old + square
        if self.name == "yogi":
            return old - (1 - self.beta2) * square * torch.sign(old - square)
        return self.beta2 * old + (1 - self.beta2) * square
