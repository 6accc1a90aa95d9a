"""Weighted means over clients, and what methods that freeze one factor share."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flower_split.aggregation.core.checks import Share
from flower_split.aggregation.core.factors import Factors

logger = logging.getLogger(__name__)


def mean_of(clients: Sequence[Share], pick: Callable[[Factors], Tensor]) -> Tensor:
    """Return the weighted mean of one fp64 tensor over clients, summed in their order.

    Args:
        clients: The round's clients.
        pick: Takes the tensor from what a client returned.
    """
    total = clients[0].share * pick(clients[0].returned).double()
    for client in clients[1:]:
        total = total + client.share * pick(client.returned).to(total.device, torch.float64)
    return total


def mean_a(clients: Sequence[Share]) -> Tensor:
    """Return Σ w A, [r, in], fp64."""
    return mean_of(clients, lambda factors: factors.A)


def mean_b(clients: Sequence[Share], scale: float) -> Tensor:
    """Return Σ w B with every client's B written at one scale, [out, r], fp64."""
    return mean_of(clients, lambda factors: factors.B.double() * (factors.scale / scale))


def held_shares(clients: Sequence[Share], rank: int) -> Tensor:
    """Return [rank], fp64: the sum of the shares of the clients that have each component of a ΔW."""
    held = torch.zeros(rank, dtype=torch.float64)
    for client in clients:
        held[: client.returned.rank] += client.share
    return held


def step_towards(old: Tensor, mean: Tensor, learning_rate: float) -> Tensor:
    """Return old + η (mean − old), fp32; the mean itself at η = 1."""
    if learning_rate == 1:
        return mean.float()
    return (old.double() + learning_rate * (mean - old.double())).float()


def note_frozen(method: str, clients: Sequence[Share], part: str) -> None:
    """Say in the log which clients changed the factor that this round freezes."""
    changed = [
        client.client_id
        for client in clients
        if not torch.equal(getattr(client.received, part), getattr(client.returned, part))
    ]
    if changed:
        logger.warning(
            "%s freezes %s this round, but %d client(s) changed it (%s …); their change of it is "
            "not used. Freeze it on the client, as the aggregator's trainable() says.",
            method,
            part,
            len(changed),
            changed[0],
        )
