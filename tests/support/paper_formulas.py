"""Each paper's server formula on dense fp64 matrices, written from the paper in numpy.

Nothing here uses the package's linear algebra, nor torch, but for reading what the clients sent. A
client is ``(B [out, r], A [r, in], s, n)``: ΔW_i = s B A, and n is its number of examples.
"""

from collections.abc import Sequence

import numpy as np
import torch

from flower_split.aggregation import Factors, Update

Client = tuple[np.ndarray, np.ndarray, float, float]
Pair = tuple[np.ndarray, np.ndarray]


def client(factors: Factors, weight: float = 1.0) -> Client:
    """Read one pair of factors."""
    return factors.B.double().numpy(), factors.A.double().numpy(), float(factors.scale), weight


def clients(updates: Sequence[Update], part: str = "returned") -> list[Client]:
    """Read what every client received or returned."""
    return [client(getattr(update, part), update.weight) for update in updates]


def shares(group: Sequence[Client]) -> np.ndarray:
    """Return n_i / Σ n."""
    counts = np.array([n for _, _, _, n in group], dtype=float)
    return counts / counts.sum()


def delta(one: Client) -> np.ndarray:
    """Return ΔW of one client."""
    b, a, s, _ = one
    return s * b @ a


def fedavg(group: Sequence[Client]) -> np.ndarray:
    """Return the ideal global update, Σ n_i/n ΔW_i."""
    return sum(p * delta(one) for p, one in zip(shares(group), group, strict=True))


def fedit(group: Sequence[Client]) -> Pair:
    """Average the factors: B̄ = Σ p B, Ā = Σ p A (arXiv 2305.05644)."""
    parts = list(zip(shares(group), group, strict=True))
    return sum(p * b for p, (b, _, _, _) in parts), sum(p * a for p, (_, a, _, _) in parts)


def svd_top(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the first ``rank`` components of a matrix, by dense SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def flora(group: Sequence[Client]) -> np.ndarray:
    """Return what goes into the base, [B_1 … B_K] [p_1 A_1; …; p_K A_K] (arXiv 2409.05976)."""
    b = np.concatenate([b for b, _, _, _ in group], axis=1)
    rows = [p * s * a for p, (_, a, s, _) in zip(shares(group), group, strict=True)]
    return b @ np.concatenate(rows, axis=0)


def florist(group: Sequence[Client], tau: float) -> np.ndarray:
    """Decompose both stacks, then the core; keep the least p with energy ≥ τ (arXiv 2506.09199)."""
    b_stack = np.concatenate([b for b, _, _, _ in group], axis=1)
    rows = [p * s * a for p, (_, a, s, _) in zip(shares(group), group, strict=True)]
    u_b, s_b, vt_b = np.linalg.svd(b_stack, full_matrices=False)
    u_a, s_a, vt_a = np.linalg.svd(np.concatenate(rows, axis=0), full_matrices=False)
    core = np.diag(s_b) @ vt_b @ u_a @ np.diag(s_a)
    u, s, vt = np.linalg.svd(core)
    energy = np.cumsum(s**2) / np.sum(s**2)
    p = int(np.argmax(energy >= tau - 1e-15)) + 1 if tau < 1 else len(s)
    return (u_b @ u[:, :p] * s[:p]) @ (vt[:p] @ vt_a)


def hetlora(
    received: Sequence[Client], returned: Sequence[Client], gamma: float, rank: int
) -> Pair:
    """Prune the tail that shrank, zero-pad, weigh by ‖B A‖_F (arXiv 2401.06432)."""
    padded, norms = [], []
    for before, (b, a, s, _) in zip(received, returned, strict=True):
        keep = max(1, int(gamma * a.shape[0]))

        def tail(b: np.ndarray, a: np.ndarray, keep: int = keep) -> float:
            return float(np.linalg.norm(b[:, keep:]) * np.linalg.norm(a[keep:]))

        if tail(b, a) < tail(before[0], before[1]):
            b, a = b[:, :keep], a[:keep]
        missing = rank - a.shape[0]
        padded.append((np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))))
        norms.append(np.linalg.norm(s * b @ a))
    total = sum(norms)
    b = sum(norm / total * b for norm, (b, _) in zip(norms, padded, strict=True))
    return b, sum(norm / total * a for norm, (_, a) in zip(norms, padded, strict=True))


def fedex_residual(group: Sequence[Client]) -> np.ndarray:
    """Return Σ p B A − B̄ Ā, of clients of one scale (arXiv 2410.09432)."""
    b, a = fedit(group)
    return fedavg(group) - group[0][2] * b @ a


def lora_fair_objective(
    group: Sequence[Client], residual: np.ndarray, penalty: float
) -> tuple[float, np.ndarray]:
    """Return 1 − cos(ΔW, (B̄ + ΔB) Ā) + λ‖ΔB‖_F, and its gradient in ΔB (arXiv 2411.14961, eq. 8)."""
    mean_b, a = fedit(group)
    ideal = fedavg(group)
    merged = (mean_b + residual) @ a
    size, length = np.linalg.norm(merged), np.linalg.norm(ideal)
    cosine = float(np.sum(ideal * merged) / (size * length))
    distance = np.linalg.norm(residual)
    slope = -(ideal / (size * length) - cosine * merged / size**2) @ a.T
    value = 1 - cosine + penalty * distance
    return value, slope + penalty * residual / max(distance, 1e-300)


def raflora(group: Sequence[Client]) -> np.ndarray:
    """Average each partition of ranks over the clients that have it (arXiv 2602.13486)."""
    borders = [0, *sorted({a.shape[0] for _, a, _, _ in group})]
    total = np.zeros((group[0][0].shape[0], group[0][1].shape[1]))
    for first, last in zip(borders, borders[1:], strict=False):
        holders = [one for one in group if one[1].shape[0] >= last]
        for p, (b, a, s, _) in zip(shares(holders), holders, strict=True):
            total += p * s * b[:, first:last] @ a[first:last]
    return total


def fedsvd(group: Sequence[Client], a: np.ndarray) -> Pair:
    """Average B, then B ← U Σ, A ← Vᵀ of SVD(B̂ A) (arXiv 2505.12805)."""
    mean = sum(p * b for p, (b, _, _, _) in zip(shares(group), group, strict=True))
    u, s, vt = np.linalg.svd(mean @ a, full_matrices=False)
    rank = a.shape[0]
    return u[:, :rank] * s[:rank], vt[:rank]


class AdaptiveServer:
    """FedAdagrad, FedYogi and FedAdam on one matrix (arXiv 2003.00295, Algorithm 2).

    Args:
        name: ``adagrad``, ``yogi`` or ``adam``.
        rate: η.
        tau: τ; the second moment begins at τ².
    """

    def __init__(self, name: str, rate: float, beta1: float, beta2: float, tau: float) -> None:
        self.name, self.rate, self.beta1, self.beta2, self.tau = name, rate, beta1, beta2, tau
        self.m: np.ndarray | float = 0.0
        self.v: np.ndarray | float = tau**2

    def step(self, change: np.ndarray) -> np.ndarray:
        """Return what Δ adds to the weights."""
        self.m = self.beta1 * self.m + (1 - self.beta1) * change
        square = change**2
        if self.name == "adagrad":
            self.v = self.v + square
        elif self.name == "yogi":
            self.v = self.v - (1 - self.beta2) * square * np.sign(self.v - square)
        else:
            self.v = self.beta2 * self.v + (1 - self.beta2) * square
        return self.rate * self.m / (np.sqrt(self.v) + self.tau)


def error(found: torch.Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Return ‖found − expected‖ / ‖expected‖, Frobenius."""
    array = found.double().numpy() if isinstance(found, torch.Tensor) else found
    return float(np.linalg.norm(array - expected) / max(float(np.linalg.norm(expected)), 1e-30))
