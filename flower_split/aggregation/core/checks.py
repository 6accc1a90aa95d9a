"""Refusing what cannot be aggregated, naming the client; nothing here computes a result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from flower_split.aggregation.core.factors import Factors, State, Update
from flower_split.errors import AggregationError

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A checked update with its share of the round.

    Args:
        client_id: As in the update.
        received: As in the update.
        returned: As in the update.
        share: weight / Σ weights, in [0, 1].
    """

    client_id: str | int
    received: Factors
    returned: Factors
    share: float


def _finite(value: object) -> float | None:
    """Return ``value`` as a float if it is one finite real number, else None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def check_factors(factors: Factors, who: str) -> None:
    """Refuse factors that do not describe a ΔW.

    Args:
        factors: The factors to check.
        who: The subject of the error's sentence, such as ``client 'a' returned factors``.

    Raises:
        AggregationError: Wrong type, shape or scale, NaN or Inf inside, or a ΔW that overflows fp32.
    """
    for name in ("A", "B"):
        tensor = getattr(factors, name, None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AggregationError(f"{who} whose {name} is {kind}; it must be a floating tensor.")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise AggregationError(
                f"{who} whose {name} has shape {list(tensor.shape)}; A must be [r, in] and "
                "B [out, r], with no dimension 0."
            )
    if factors.A.shape[0] != factors.B.shape[1]:
        raise AggregationError(
            f"{who} whose ranks differ: A is {list(factors.A.shape)}, B is "
            f"{list(factors.B.shape)}; A must be [r, in] and B [out, r]."
        )
    scale = _finite(factors.scale)
    if scale is None or scale <= 0:
        raise AggregationError(
            f"{who} with scale {factors.scale!r}; it must be finite and above 0 (alpha / r)."
        )
    size = scale
    for name in ("A", "B"):
        # The length of fp32 numbers in fp64 is finite exactly if all of them are.
        length = float(torch.linalg.vector_norm(getattr(factors, name), dtype=torch.float64))
        if not math.isfinite(length):
            raise AggregationError(
                f"{who} with NaN or Inf in {name}; drop this client from the round, or lower its "
                "learning rate."
            )
        size *= length
    if size > _LARGEST:
        raise AggregationError(
            f"{who} of a ΔW of size {size:.1g} (scale · ‖A‖ · ‖B‖), beyond the largest number of "
            f"fp32, {_LARGEST:.1g}; drop this client from the round, or lower its learning rate."
        )


def check_weight(client_id: str | int, weight: object) -> float:
    """Return the weight as a float; any real number is taken, and a tensor of one element.

    Raises:
        AggregationError: It is not a finite number of at least 0.
    """
    value = _finite(weight)
    if value is None or value < 0:
        raise AggregationError(
            f"client {client_id!r} has weight {weight!r}; weights must be finite numbers of at "
            "least 0."
        )
    return value


def client_order(client_id: str | int) -> tuple[str, int, str]:
    """Return the key by which clients are ordered before any sum: numbers by value, then names."""
    number = client_id if isinstance(client_id, int) else 0
    return type(client_id).__name__, number, str(client_id)


def shares_of(weights: dict[str | int, float] | Sequence[tuple[str | int, float]]) -> list[float]:
    """Return each weight's share of the sum, in the order given.

    Raises:
        AggregationError: A weight is invalid, or all are 0.
    """
    pairs = list(weights.items()) if isinstance(weights, dict) else list(weights)
    values = [check_weight(client_id, weight) for client_id, weight in pairs]
    largest = max(values, default=0.0)
    if largest == 0:
        named = ", ".join(repr(client_id) for client_id, _ in pairs[:10])
        raise AggregationError(
            f"the weights of all {len(pairs)} clients are 0 ({named}); at least one must be "
            "above 0: check what the clients report as num-examples or num-tokens."
        )
    # Divided by the largest first, so that neither huge nor tiny weights leave the float range.
    scaled = [value / largest for value in values]
    total = math.fsum(scaled)
    return [value / total for value in scaled]


def check_updates(state: State, updates: Sequence[Update]) -> list[Share]:
    """Check a round's updates against the state and each other, and order them by client.

    Raises:
        AggregationError: There is none, or one is malformed; the client is named.
    """
    ordered = sorted(updates, key=lambda update: client_order(update.client_id))
    if not ordered:
        raise AggregationError("no client update to aggregate; a round needs at least one.")
    expected = [state.out_features, state.in_features]
    for update in ordered:
        for verb, factors in (("received", update.received), ("returned", update.returned)):
            check_factors(factors, f"client {update.client_id!r} {verb} factors")
            found = [factors.out_features, factors.in_features]
            if found != expected:
                raise AggregationError(
                    f"client {update.client_id!r} {verb} factors of a ΔW of shape {found}; this "
                    f"module's is {expected}."
                )
        if update.received.rank != update.returned.rank:
            raise AggregationError(
                f"client {update.client_id!r} received factors of rank {update.received.rank} and "
                f"returned rank {update.returned.rank}; a client keeps the rank it was given."
            )
    shares = shares_of([(update.client_id, update.weight) for update in ordered])
    return [
        Share(update.client_id, update.received, update.returned, share)
        for update, share in zip(ordered, shares, strict=True)
    ]


def common_rank(method: str, state: State, clients: Sequence[Share]) -> int:
    """Return the one rank of all clients and the state, for methods that average factors.

    Raises:
        AggregationError: A client has another rank.
    """
    for client in clients:
        if client.returned.rank != state.factors.rank:
            raise AggregationError(
                f"{method} needs one rank for all: client {client.client_id!r} has rank "
                f"{client.returned.rank}, the global adapter {state.factors.rank}. Use "
                '"product-delta", "flexlora", "flora" or "florist" for mixed ranks.'
            )
    return state.factors.rank


def common_scale(method: str, clients: Sequence[Share]) -> float:
    """Return the one scale of all clients, for methods whose result depends on the factorisation.

    Raises:
        AggregationError: Two clients have different scales.
    """
    first = clients[0]
    for client in clients[1:]:
        if not math.isclose(client.returned.scale, first.returned.scale, rel_tol=1e-9):
            raise AggregationError(
                f"{method} averages factors, which means nothing under mixed scales: client "
                f"{client.client_id!r} has {client.returned.scale}, client {first.client_id!r} "
                f'{first.returned.scale}. Use "product-delta" or give all the same alpha / r.'
            )
    return first.returned.scale
