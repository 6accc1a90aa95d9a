"""The exact mean of clients that train DoRA: their magnitudes and their ΔW, made to fit each other.

Client i computes with ``Wᵢ = mᵢ ⊙ (W + ΔWᵢ) / nᵢ``, where nᵢ [out] is the norm of every row of
W + ΔWᵢ. The mean of the Wᵢ is not what the mean of mᵢ and the mean of ΔWᵢ give: directions that
disagree shorten it. With shares wᵢ, aᵢ = wᵢ mᵢ / nᵢ and C = Σ aᵢ, by row::

    Σ wᵢ Wᵢ = C ⊙ (W + Σ (aᵢ / C) ⊙ ΔWᵢ)

so it is DoRA again: ΔW is the mean of the clients' with weights aᵢ / C instead of wᵢ, row by row, and
m is the norm of every row of Σ wᵢ Wᵢ. The server needs no base weights for that norm. Each client
says its nᵢ, and with V = W + ΔW₀ as the run began, whose row norms m₀ everybody knows::

    V · (ΔWᵢ − ΔW₀) = (nᵢ² − m₀² − ‖ΔWᵢ − ΔW₀‖²) / 2

DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flower_split.aggregation.core.adapter_layout import (
    EMBEDDING,
    MAGNITUDE,
    factors_from,
    layout_of,
)
from flower_split.aggregation.core.checks import shares_of
from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors
from flower_split.aggregation.core.lowrank import same_factors
from flower_split.errors import AggregationError

_SMALLEST = 1e-3  # of C against Σ |a|: below, a row's clients cancel out, and it has no direction

Norms = Mapping[str, Tensor]
"""Module name -> the norm of every row (of an embedding: column) of W + ΔW, [out]."""


@dataclass(frozen=True, slots=True)
class DoraMean:
    """A transform of a round's updates, for methods whose result is the mean of ΔW.

    Afterwards the weighted mean of the returned ΔW and that of the magnitudes are as the module
    docstring says. Modules whose clients were sent different factors are left as they are: truncated
    to another rank, a direction is shorter before anybody trains.

    Args:
        initial: The adapter that the run began with.
        scales: Module name -> ΔW scale.
        norms: What each client says of its modules after training, by client.
    """

    initial: Mapping[str, Tensor]
    scales: Mapping[str, float]
    norms: Mapping[str | int, Norms] = field(default_factory=dict)

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Return the clients with other returned factors and magnitudes."""
        layout = layout_of(self.initial)
        modules = {c: dict(client.modules) for c, client in enumerate(clients)}
        others = {c: dict(client.others) for c, client in enumerate(clients)}
        for module, suffixes in layout.modules.items():
            held = [c for c in modules if module in modules[c] and clients[c].weight > 0]
            if module + MAGNITUDE not in self.initial or not held:
                continue
            updates = [modules[c][module] for c in held]
            if not all(same_factors(u.received, updates[0].received) for u in updates):
                continue
            magnitudes = [others[c][module + MAGNITUDE][1] for c in held]
            norms = [self.norms[clients[c].client_id][module].double() for c in held]
            turned = suffixes == EMBEDDING
            rows = [_rows(u.returned, turned) for u in updates]
            start = factors_from(self.initial, module, suffixes, self.scales[module])
            first = self.initial[module + MAGNITUDE].double()
            shares = shares_of([(clients[c].client_id, clients[c].weight) for c in held])
            factor, mean = _fit(rows, magnitudes, norms, shares, _rows(start, turned), first)
            for position, c in enumerate(held):
                own = _scaled(updates[position].returned, factor[position], turned)
                modules[c][module] = replace(updates[position], returned=own)
                received = others[c][module + MAGNITUDE][0]
                others[c][module + MAGNITUDE] = (received, mean)
        return [
            replace(client, modules=modules[c], others=others[c])
            for c, client in enumerate(clients)
        ]


def norms_from(
    client_id: str | int, raw: Mapping[str, bytes], adapter: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check what a client says of its norms.

    Args:
        client_id: The client, for errors.
        raw: Module name -> fp32 values.
        adapter: The adapter that the client was sent; its magnitudes name modules and shapes.

    Raises:
        AggregationError: The norms of a module are missing, or no norms of its weight.
    """
    norms: dict[str, Tensor] = {}
    for name, magnitude in adapter.items():
        if not name.endswith(MAGNITUDE):
            continue
        module = name.removesuffix(MAGNITUDE)
        value = raw.get(module, b"")
        if len(value) == 4 * magnitude.numel():
            norm = torch.frombuffer(bytearray(value), dtype=torch.float32)
            if bool((torch.isfinite(norm) & (norm > 0)).all()):
                norms[module] = norm
                continue
        raise AggregationError(
            f"client {client_id!r} was asked for the norms of {module} after training, "
            f"{magnitude.numel()} numbers above 0; it gave {len(value) // 4} numbers, or some that "
            'are no norms. Set strategy.dora = "mean" to do without them.'
        )
    return norms


def _rows(factors: Factors, turned: bool) -> tuple[Tensor, Tensor]:
    """Return ΔW as ``P @ Q``, fp64, a row for each magnitude; an embedding's are its columns."""
    left, right = factors.B.double() * factors.scale, factors.A.double()
    return (right.T, left.T) if turned else (left, right)


def _scaled(factors: Factors, factor: Tensor, turned: bool) -> Factors:
    if turned:
        return Factors((factors.A.double() * factor).float(), factors.B, factors.scale)
    return Factors(factors.A, (factors.B.double() * factor[:, None]).float(), factors.scale)


def _fit(
    rows: Sequence[tuple[Tensor, Tensor]],
    magnitudes: Sequence[Tensor],
    norms: Sequence[Tensor],
    shares: Sequence[float],
    start: tuple[Tensor, Tensor],
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the factor of every client's rows, [clients, out], and the common magnitude, [out]."""
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    weight = share * torch.stack([m / n for m, n in zip(magnitudes, norms, strict=True)])
    total = weight.sum(0)
    square = total**2 * first**2
    for own, norm, row in zip(weight, norms, rows, strict=True):
        change = _square([(row, torch.ones_like(first)), (start, -torch.ones_like(first))])
        square = square + total * own * (norm**2 - first**2 - change)
    square = square + _square(
        [*zip(rows, weight, strict=True), (start, -total)]  # Σ aᵢ (ΔWᵢ − ΔW₀)
    )
    # Where the clients cancel out there is no common direction: the plain means stay.
    sound = (total > _SMALLEST * weight.abs().sum(0)) & (square > 0)
    mean = sum(s * m for s, m in zip(shares, magnitudes, strict=True))
    factor = torch.where(sound, weight / (total * share), torch.ones_like(weight))
    return factor, torch.where(sound, square.clamp(min=0).sqrt(), mean)


def _square(terms: Sequence[tuple[tuple[Tensor, Tensor], Tensor]]) -> Tensor:
    """Return the squared norm of every row of ``Σ c ⊙ (P @ Q)``, for terms ``((P, Q), c)``."""
    left = torch.cat([rows[0] * weight[:, None] for rows, weight in terms], dim=1)
    right = torch.cat([rows[1] for rows, _ in terms], dim=0)
    return ((left @ (right @ right.T)) * left).sum(1)


def has_magnitudes(adapter: Mapping[str, Tensor]) -> bool:
    """Return whether an adapter has DoRA somewhere."""
    return any(name.endswith(MAGNITUDE) for name in adapter)
