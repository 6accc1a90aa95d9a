"""Linear algebra on sums of low-rank products, without ever forming the [out, in] matrix.

A sum Σ cᵢ BᵢAᵢ is the product of the concatenated factors. QR of both sides leaves a core of
[R, R], R = Σ rᵢ, whose SVD gives the sum's (Golub and Van Loan, Matrix Computations, §5). Factors
come and go in fp32; everything between is fp64, which costs a factor of two and keeps nine digits.

``P`` and ``Q`` below are the sides of a product: P [out, R], Q [R, in].
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from flower_split.aggregation.core.factors import Factors

ROUNDING_CUT = 1e-12
"""Singular values below this share of the sides' sizes are dropped: fp64 rounding noise, such as
what is left where terms of a sum cancel."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """A truncated SVD in fp64: U [out, p], S [p] descending, Vh [p, in]."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def top(self, rank: int) -> "Spectrum":
        """Return the leading ``rank`` components."""
        return Spectrum(self.U[:, :rank], self.S[:rank], self.Vh[:rank])


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix, mode="reduced")
    return q, r


def _upper(matrix: Tensor) -> Tensor:
    """Return the triangular factor of a QR, without its orthogonal one."""
    _, upper = torch.linalg.qr(matrix, mode="r")
    return cast(Tensor, upper)


def svd_of_product(p: Tensor, q: Tensor, max_rank: int | None = None) -> Spectrum:
    """Return the SVD of P @ Q by QR of both sides and SVD of the core.

    Args:
        p: [out, R], fp64.
        q: [R, in], fp64.
        max_rank: Keep at most this many components.

    Returns:
        Components with singular values above the rounding noise; possibly none.
    """
    r_left, r_right = _upper(p), _upper(q.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    floor = float(r_left.norm() * r_right.norm()) * ROUNDING_CUT
    keep = int((s > floor).sum())
    keep = keep if max_rank is None else min(keep, max_rank)
    u, s, vh = u[:, :keep], s[:keep], vh[:keep]
    # With P = L r_left and Q = r_right.T M.T: P r_right.T v = L (r_left r_right.T) v = L u s.
    # The orthogonal L and M, half the work of a QR, are thus never built.
    left = p @ ((r_right.T @ vh.T) / s)
    right = ((u.T @ r_left) / s[:, None]) @ q
    return Spectrum(left, s, right)


class LowRankSum:
    """A running Σ c · scale · B @ A in factored form, in bounded memory.

    Concatenated columns are compressed whenever they exceed a budget. Without ``working_rank`` the
    compression is lossless: the rank of the sum cannot exceed min(out, in), and neither does what
    is kept. With it, only the leading components survive each compression, and memory depends on
    neither the number of clients nor min(out, in).

    Args:
        out_features: Rows of the sum.
        in_features: Columns of the sum.
        working_rank: Components kept by a compression; None: all.
        device: Where the sum is computed; None: where the first term is.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        working_rank: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        limit = min(out_features, in_features)
        self._limit = limit if working_rank is None else min(limit, working_rank)
        self._lossless = self._limit == limit
        self._budget = 2 * self._limit
        self._shape = (out_features, in_features)
        self._device = device
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._rank = 0

    def add(self, factors: Factors, coefficient: float) -> None:
        """Add coefficient · ΔW of ``factors``."""
        self.add_product(
            factors.B.to(self._device, torch.float64),
            factors.A.to(self._device, torch.float64),
            coefficient * factors.scale,
        )

    def add_product(self, p: Tensor, q: Tensor, coefficient: float = 1.0) -> None:
        """Add coefficient · P @ Q (fp64)."""
        if coefficient == 0:
            return
        root = abs(coefficient) ** 0.5  # on both sides, so that neither dominates the core
        self._left.append(p * (root if coefficient > 0 else -root))
        self._right.append(q * root)
        self._rank += int(q.shape[0])
        if self._rank > self._budget:
            self._compress()

    def _compress(self) -> None:
        p, q = self.product()
        if not self._lossless:
            spectrum = svd_of_product(p, q, self._limit)
            p, q = spectrum.U * spectrum.S, spectrum.Vh
        elif p.shape[0] <= q.shape[1]:
            p, r = _qr(p)
            q = r @ q
        else:
            right, r = _qr(q.T)
            p, q = p @ r.T, right.T
        self._left, self._right, self._rank = [p], [q], int(q.shape[0])

    def product(self) -> tuple[Tensor, Tensor]:
        """Return the sum as P [out, R], Q [R, in] in fp64; R is 0 for an empty sum."""
        if not self._left:
            out, into = self._shape
            return (
                torch.zeros(out, 0, dtype=torch.float64, device=self._device),
                torch.zeros(0, into, dtype=torch.float64, device=self._device),
            )
        return torch.cat(self._left, dim=1), torch.cat(self._right, dim=0)

    def spectrum(self, max_rank: int | None = None) -> Spectrum:
        """Return the SVD of the sum, at most ``max_rank`` components."""
        p, q = self.product()
        if q.shape[0] == 0:
            return Spectrum(p, torch.zeros(0, dtype=torch.float64, device=p.device), q)
        return svd_of_product(p, q, max_rank)


def row_length(basis: Tensor) -> float:
    """Return the root mean square length of the rows of a LoRA A: about 1/√3 as PEFT initialises it."""
    length = float(basis.double().square().sum(dim=1).mean().sqrt())
    return length if length > 0 else 1.0


def factors_of(spectrum: Spectrum, length: float) -> Factors:
    """Return the SVD as factors of scale 1, largest component first.

    The rows of A get ``length`` and B the rest: a client's next steps then move ΔW as far as from
    a fresh LoRA, whatever the size of ΔW is by now.
    """
    return Factors((spectrum.Vh * length).float(), (spectrum.U * (spectrum.S / length)).float())


def inner_product(left: Factors, right: Factors) -> float:
    """Return ⟨ΔW, ΔW'⟩ in the Frobenius sense, from [r, r'] matrices only."""
    by_b = left.B.double().T @ right.B.double()
    by_a = left.A.double() @ right.A.double().T
    return float((by_b * by_a).sum()) * left.scale * right.scale


def same_factors(left: Factors, right: Factors) -> bool:
    """Return whether both are the same tensors, bit for bit, at the same scale."""
    return left is right or (
        left.scale == right.scale
        and left.A.shape == right.A.shape
        and left.B.shape == right.B.shape
        and torch.equal(left.A, right.A)
        and torch.equal(left.B, right.B)
    )
