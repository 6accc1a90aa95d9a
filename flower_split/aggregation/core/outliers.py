"""Who is far above the others of a round: by a multiple of the median.

The median of an even number is its upper middle value. With fewer hostile clients than honest ones it lies
between what honest ones gave, whatever the others did; and it depends on no order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from flower_split.aggregation.core.client_updates import ClientUpdate, Transform
from flower_split.aggregation.core.factors import Factors, Update
from flower_split.aggregation.core.lowrank import inner_product

Name = TypeVar("Name", bound=str | int)

LEAST = 3  # of two, nobody can tell which one is right


def median(values: Mapping[Name, float]) -> float:
    """Return the middle value, or the larger of the two."""
    return sorted(values.values())[len(values) // 2]


def multiples(values: Mapping[Name, float]) -> dict[Name, float]:
    """Return each value over the median; empty where fewer than three have one, or where it is 0."""
    middle = median(values) if len(values) >= LEAST else 0.0
    return {name: value / middle for name, value in values.items()} if middle else {}


def above_median(values: Mapping[Name, float], factor: float) -> dict[Name, float]:
    """Return whose value is more than ``factor`` times the median, each with that multiple.

    Args:
        values: Finite, and not negative.
        factor: 0: there is no bound.
    """
    found = multiples(values) if factor else {}
    return {name: multiple for name, multiple in found.items() if multiple > factor}


def moved(client: ClientUpdate, *, factors: bool) -> float:
    """Return how far a client has moved its adapter: an L2 norm, in fp64.

    Args:
        client: A checked update.
        factors: Measure A and B as they are, for methods of which the server has one alone; else
            the change of ΔW, which does not depend on how it is factored.
    """
    measure = _factor_change if factors else _delta_change
    total = sum(measure(update) for update in client.modules.values())
    for received, returned in client.others.values():
        total += float((returned - received).square().sum())
    return float(total**0.5)


def _delta_change(update: Update) -> float:
    """Return ‖s (B'A' − BA)‖²: of the product of [B', B] and [A'; −A], from small matrices."""
    sent, back = update.received, update.returned
    change = Factors(torch.cat([back.A, -sent.A]), torch.cat([back.B, sent.B], dim=1), back.scale)
    return max(0.0, inner_product(change, change))


def _factor_change(update: Update) -> float:
    sent, back = update.received, update.returned
    pairs = ((back.A, sent.A), (back.B, sent.B))
    return sum(float((new.double() - old.double()).square().sum()) for new, old in pairs)


@dataclass(frozen=True, slots=True)
class Outliers:
    """Says which clients of a round moved their adapters far more than the others.

    One that trained on ten times as much as the median client may have moved ten times as far: it
    took ten times the steps.

    Args:
        factor: Of the median; 0: there is no bound.
        factors: As for :func:`moved`.
    """

    factor: float
    factors: bool = False

    def __call__(self, clients: Sequence[ClientUpdate]) -> dict[str | int, str]:
        """Return who did, each with the reason."""
        if self.factor == 0 or len(clients) < LEAST:
            return {}
        return {
            name: f"client {name!r} moved its adapter by {multiple:.4g} times the median of the round's "
            f"clients; it may be {self.factor:g} times (strategy.outlier-factor). Look at its data "
            "and its version of the app, or raise the key."
            for name, multiple in above_median(self.distances(clients), self.factor).items()
        }

    def leave_out(
        self, clients: Sequence[ClientUpdate], rules: Sequence[Transform]
    ) -> tuple[list[ClientUpdate], dict[str | int, str]]:
        """Return what the rules make of a round's clients, and who was left out, with the reasons.

        What the rules have clipped is no longer far away. Those that stay are ruled and compared anew:
        they are a round in which the others never were.
        """
        gone: dict[str | int, str] = {}
        while True:
            ruled: Sequence[ClientUpdate] = [c for c in clients if c.client_id not in gone]
            for rule in rules:
                ruled = rule(ruled)
            if not (far := self(ruled)):
                return list(ruled), gone
            gone |= far

    def distances(self, clients: Sequence[ClientUpdate]) -> dict[str | int, float]:
        """Return how far each moved, for what it trained on."""
        reach = allowances({client.client_id: client.weight for client in clients})
        return {
            client.client_id: moved(client, factors=self.factors) / reach[client.client_id]
            for client in clients
        }


def allowances(weights: Mapping[Name, float]) -> dict[Name, float]:
    """Return how many times as far as the median client each may move: by its weight, at least 1."""
    typical = median(weights)
    return {
        name: max(1.0, weight / typical) if typical else 1.0 for name, weight in weights.items()
    }
