"""The independent reference: dense fp64 ΔW and its SVD; and clients that train at random.

Nothing here uses the package's linear algebra.
"""

from collections.abc import Sequence

import torch

from flower_split.aggregation import Aggregator, Factors, State, Update

OUT, IN = 24, 18

TRAINS = {"ffa-lora": "B", "fedsvd": "B"}
"""Factors that a method's clients train, where it is not both (rolora, fed-sb: see ``trained``)."""


def dense(factors: Factors | None) -> torch.Tensor:
    """ΔW in fp64."""
    if factors is None:
        return torch.zeros(OUT, IN, dtype=torch.float64)
    return factors.scale * (factors.B.double() @ factors.A.double())


def merged(aggregator: Aggregator, result) -> torch.Tensor:
    """What a round's merged update is: the global ΔW and what goes into the base."""
    return dense(aggregator.delta(result.state)) + dense(result.residual)


def weighted_mean(updates: Sequence[Update]) -> torch.Tensor:
    """Σ w s B A / Σ w."""
    total = sum(update.weight for update in updates)
    return sum(dense(update.returned) * (update.weight / total) for update in updates)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, Frobenius."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of that rank, by dense SVD."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def initial(rank: int = 4, scale: float = 2.0, seed: int = 0, trained: bool = False) -> Factors:
    """A fresh LoRA (B = 0), or one that has been trained before."""
    rng = generator(seed)
    a = (torch.rand(rank, IN, generator=rng) * 2 - 1) / IN**0.5
    b = torch.randn(OUT, rank, generator=rng) * 0.3 if trained else torch.zeros(OUT, rank)
    return Factors(a, b, scale)


def trained(
    name: str, server_round: int, received: Factors, rng: torch.Generator, size: float = 0.3
) -> Factors:
    """What a client of this method returns: its trainable factors moved at random."""
    parts = TRAINS.get(name, "AB")
    if name == "rolora":
        parts = "BA"[server_round % 2]
    a, b = received.A.clone(), received.B.clone()
    if name == "fed-sb":
        parts = "BA"[server_round % 2]
    if name == "fed-sb" and server_round > 1:  # the core moves, its column space does not
        rank = received.rank
        b = b @ (torch.eye(rank) + size * torch.randn(rank, rank, generator=rng))
        return Factors(a, b, received.scale)
    if "A" in parts:
        a += size / IN**0.5 * torch.randn(a.shape, generator=rng)
    if "B" in parts:
        b += size * torch.randn(b.shape, generator=rng)
    return Factors(a, b, received.scale)


def play(
    name: str,
    aggregator: Aggregator,
    state: State,
    *,
    server_round: int = 0,
    ranks: Sequence[int] = (4, 4, 4),
    scales: Sequence[float] = (2.0, 2.0, 2.0),
    weights: Sequence[float] = (1.0, 5.0, 2.0),
    seed: int = 0,
    size: float = 0.3,
) -> list[Update]:
    """One round's updates: every client receives from the state and trains."""
    rng = generator(1000 + 97 * seed + server_round)
    updates = []
    for index, (rank, scale, weight) in enumerate(zip(ranks, scales, weights, strict=True)):
        received = aggregator.distribute(state, rank, scale)
        returned = trained(name, server_round, received, rng, size) if size else received
        updates.append(Update(f"client-{index}", received, returned, weight))
    return updates
