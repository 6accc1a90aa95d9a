"""Fed-SB: an r × r core between a frozen B and a frozen A is all that is averaged.

Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning. Raghav Singhal, Kaustubh Ponkshe, Rohit Vartak, Lav R. Varshney, Praneeth
Vepakomma. arXiv 2502.15436.

ΔW = P C Q with P [out, r] and Q [r, in] orthonormal and the same for everybody, so the mean of the
cores C is exact. P and Q come from the leading directions of the first mean update, as LoRA-SB
takes them from the first gradient; if the initial ΔW is not 0, from its factors.

In LoRA's terms a client receives A = Q and B = P C, and returns any factors: what counts is their
core Pᵀ ΔW Qᵀ, [r, r], which :func:`core_of` gives a client that wants to send nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share, check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, row_length
from flower_split.aggregation.core.method import Aggregator, only_own_rank, padded


def core_of(factors: Factors, p: Tensor, q: Tensor) -> Tensor:
    """Pᵀ ΔW Qᵀ, [r, r] in fp64, from factors and the frozen P [out, r] and Q [r, in]."""
    left = p.to(factors.B.device, torch.float64).T @ factors.B.double()
    right = factors.A.double() @ q.to(factors.A.device, torch.float64).T
    return (left @ right).mul(factors.scale)


def _orthonormal(columns: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(columns.double(), mode="reduced")
    return cast(Tensor, basis)


@dataclass(frozen=True, kw_only=True, slots=True)
class FedSB(Aggregator):
    """C ← Σ w C."""

    name: ClassVar[str] = "fed-sb"
    takes_learning_rate: ClassVar[bool] = True

    def init(self, factors: Factors) -> State:
        """The initial state; see :class:`Aggregator`."""
        state = Aggregator.init(self, factors)
        if not bool(factors.B.any()):
            return state
        p, q = _orthonormal(factors.B), _orthonormal(factors.A.T).T
        return self._with_core(state, p, q, core_of(factors, p, q))

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """One round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        state = replace(state, server_round=state.server_round + 1)
        if "P" not in state.extra:
            return AggregationResult(self._first_core(state, clients))
        p, q, old = (state.extra[name] for name in ("P", "Q", "core"))
        mean = torch.zeros_like(old)
        for client in clients:
            mean += client.share * core_of(client.returned, p, q).to(mean.device)
        core = old + self.learning_rate * (mean - old)
        return AggregationResult(self._with_core(state, p, q, core))

    def distribute(
        self, state: State, rank: int | None = None, scale: float | None = None
    ) -> Factors:
        """A = Q and B = P C; see :class:`Aggregator`."""
        return only_own_rank(self.name, state, rank, scale)

    def trainable(self, state: State) -> frozenset[str]:
        """B only; of its change, the part in the columns of P is kept."""
        return frozenset({"B"})

    def _first_core(self, state: State, clients: Sequence[Share]) -> State:
        """Choose P and Q from the first mean update; unchanged while that is 0."""
        total = LowRankSum(state.out_features, state.in_features, device=state.basis.device)
        for client in clients:
            total.add(client.returned, self.learning_rate * client.share)
        rank = state.factors.rank
        spectrum = total.spectrum(rank)
        if spectrum.S.numel() == 0:
            return state
        generator = torch.Generator().manual_seed(self.seed)
        spare = torch.randn(state.out_features, rank, generator=generator, dtype=torch.float64)
        spare = spare.to(spectrum.U.device)
        p = _orthonormal(torch.cat([spectrum.U, spare], dim=1)[:, :rank])
        q = _orthonormal(torch.cat([spectrum.Vh, state.basis.double()])[:rank].T).T
        left, right = total.product()
        return self._with_core(state, p, q, (p.T @ left) @ (right @ q.T))

    def _with_core(self, state: State, p: Tensor, q: Tensor, core: Tensor) -> State:
        """The state at ΔW = P C Q, with the factors that clients receive."""
        length = row_length(state.basis)
        scale = state.factors.scale
        factors = Factors(q * length, p @ core / (length * scale), scale)
        factors = padded(factors, state.factors.rank)
        extra = {"P": p, "Q": q, "core": core}
        return replace(state, factors=factors, extra=extra)
