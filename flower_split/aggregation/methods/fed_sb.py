"""Fed-SB: an r × r core R between a frozen B and a frozen A is all that clients train.

Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning. Raghav Singhal, Kaustubh Ponkshe, Rohit Vartak, Lav R. Varshney, Praneeth
Vepakomma. arXiv 2502.15436.

ΔW = s P R Q with P [out, r] and Q [r, in] orthonormal, frozen and the same for everybody, so the mean
of the cores R is exact. In LoRA's terms a client receives A = Q and B = P R, and P beside them
(:meth:`FedSB.core_columns`): its optimizer steps on R alone, and it returns B = P R.

The paper takes P, the first R and Q from the truncated SVD of the first full gradient, which clients
would have to compute at the frozen base weights. Here two rounds of LoRA look for the same
directions, as one step of randomised subspace iteration (Halko, Martinsson and Tropp, 2011, arXiv
0909.4061) does: round 1 trains B with the random A frozen, so that its change is the gradient seen
through random rows; round 2 trains A with that B, made orthonormal, frozen. Both means are exact and
of rank r, and the SVD of the second gives P, R and Q. If the initial ΔW is not 0, its SVD does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share, check_updates, common_rank
from flower_split.aggregation.core.factors import AggregationResult, Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, Spectrum
from flower_split.aggregation.core.method import Aggregator, padded


def core_of(factors: Factors, p: Tensor, q: Tensor) -> Tensor:
    """Return Pᵀ ΔW Qᵀ, [r, r] in fp64, from factors and the frozen P [out, r] and Q [r, in]."""
    left = p.to(factors.B.device, torch.float64).T @ factors.B.double()
    right = factors.A.double() @ q.to(factors.A.device, torch.float64).T
    return (left @ right).mul(factors.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class FedSB(Aggregator):
    """R ← Σ w R."""

    name: ClassVar[str] = "fed-sb"
    paper: ClassVar[str] = "2502.15436"
    exactness: ClassVar[str] = "exact"
    deviation: ClassVar[str] = (
        "P, Q and the first R come from the SVD of two rounds of LoRA (B, then A) instead of the "
        "first full gradient; R travels inside B = P R, with the bytes of B"
    )
    takes_learning_rate: ClassVar[bool] = True
    trains_core: ClassVar[bool] = True

    def init(self, factors: Factors) -> State:
        """Return the initial state; see :class:`Aggregator`."""
        state = Aggregator.init(self, factors)
        if not bool(factors.B.any()):
            return state
        total = LowRankSum(state.out_features, state.in_features, device=state.basis.device)
        total.add(factors, 1.0)
        return self._with_subspaces(state, total.spectrum(factors.rank))

    def aggregate(self, state: State, updates: Sequence[Update]) -> AggregationResult:
        """Aggregate one round; see :class:`Aggregator`."""
        clients = check_updates(state, updates)
        common_rank(self.name, state, clients)
        state = replace(state, server_round=state.server_round + 1)
        if "core" not in state.extra:
            return AggregationResult(self._searched(state, clients))
        p, q, old = (state.extra[name] for name in ("P", "Q", "core"))
        mean = torch.zeros_like(old)
        for client in clients:
            mean += client.share * core_of(client.returned, p, q).to(mean.device)
        core = old + self.learning_rate * (mean - old)
        return AggregationResult(self._with_core(state, p, q, core))

    def trainable(self, state: State) -> frozenset[str]:
        """Return B in round 1, A in round 2, and B for its core from then on."""
        return frozenset({"A"} if "P" in state.extra and "core" not in state.extra else {"B"})

    def core_columns(self, state: State) -> Tensor | None:
        """Return P; None in the two rounds that look for it."""
        if "core" not in state.extra:
            return None
        p = state.extra["P"].float()
        spare = p.new_zeros(p.shape[0], state.factors.rank - p.shape[1])
        return torch.cat([p, spare], dim=1)

    def _searched(self, state: State, clients: Sequence[Share]) -> State:
        """Return the state after round 1 or 2; the same one while ΔW is 0."""
        total = LowRankSum(state.out_features, state.in_features, device=state.basis.device)
        for client in clients:
            total.add(client.returned, self.learning_rate * client.share)
        if self.learning_rate != 1:
            total.add(state.factors, 1 - self.learning_rate)
        spectrum = total.spectrum(state.factors.rank)
        if spectrum.S.numel() == 0:
            return state
        if "P" in state.extra:
            return self._with_subspaces(state, spectrum)
        p = self._filled(spectrum.U, state.factors.rank)
        a = (p.T @ spectrum.U * spectrum.S) @ spectrum.Vh / state.factors.scale
        factors = padded(Factors(a, p, state.factors.scale), state.factors.rank)
        return replace(state, factors=factors, extra={"P": p})

    def _with_subspaces(self, state: State, spectrum: Spectrum) -> State:
        """Return the state that keeps the subspaces of an SVD from now on."""
        p = self._filled(spectrum.U, state.factors.rank)
        q = self._filled(spectrum.Vh.T, state.factors.rank).T.contiguous()
        core = (p.T @ spectrum.U * spectrum.S) @ (spectrum.Vh @ q.T)
        return self._with_core(state, p, q, core)

    def _filled(self, columns: Tensor, rank: int) -> Tensor:
        """Return orthonormal columns that begin with these, ``rank`` of them if they have room."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = int(columns.shape[0])
        spare = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        every = torch.cat([columns, spare.to(columns.device)], dim=1)[:, :rank]
        basis, _ = torch.linalg.qr(every, mode="reduced")
        return cast(Tensor, basis).contiguous()

    def _with_core(self, state: State, p: Tensor, q: Tensor, core: Tensor) -> State:
        """Return the state at ΔW = P core Q, with the factors that clients receive."""
        scale = state.factors.scale
        factors = padded(Factors(q, p @ core / scale, scale), state.factors.rank)
        return replace(state, factors=factors, extra={"P": p, "Q": q, "core": core})
