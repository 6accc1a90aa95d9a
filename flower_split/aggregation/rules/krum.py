"""Krum and Multi-Krum: keep the clients whose change has the nearest neighbours.

Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. Peva Blanchard, El Mahdi El
Mhamdi, Rachid Guerraoui, Julien Stainer. NeurIPS 2017, arXiv 1703.02757.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors
from flower_split.aggregation.core.lowrank import inner_product
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import AggregationError


def _changes(client: ClientUpdate) -> dict[str, Factors]:
    """Return what a client changed in each ΔW, as one product of twice the rank."""
    changes = {}
    for name, update in client.modules.items():
        sent, back = update.received, update.returned
        changes[name] = Factors(
            torch.cat([back.A, sent.A]),
            torch.cat([back.B.double() * back.scale, sent.B.double() * -sent.scale], dim=1),
        )
    return changes


def squared_distances(clients: Sequence[ClientUpdate]) -> Tensor:
    """Return ‖change_i − change_j‖² over all modules and other tensors, [clients, clients] in fp64."""
    changes = [_changes(client) for client in clients]
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for i, one in enumerate(changes):
        for j in range(i + 1):
            two = changes[j]
            value = sum(inner_product(one[name], two[name]) for name in one)
            for name, (received, returned) in clients[i].others.items():
                other_received, other_returned = clients[j].others[name]
                value += float(((returned - received) * (other_returned - other_received)).sum())
            gram[i, j] = gram[j, i] = value
    squares = gram.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Krum(Rule):
    """Keep the clients whose change of ΔW has the nearest neighbours.

    A client's score is the sum of its squared distances to its K − f − 2 nearest others; distances
    are between changes of ΔW, so clients of mixed ranks compare.

    Args:
        malicious: f, the number of clients that may be malicious; a round needs 2f + 3.
        keep: How many of the best clients to keep; 1 is Krum, more is Multi-Krum.
    """

    name: ClassVar[str] = "krum"
    measures_delta: ClassVar[bool] = True
    whole_adapters: ClassVar[bool] = True
    leaves_one: ClassVar[bool] = True  # as strategy.rules makes it, with keep at 1

    malicious: int = 1
    keep: int = 1

    def __str__(self) -> str:
        """See :class:`Rule`."""
        return f"{self.name} against {self.malicious} malicious clients"

    @property
    def clients_needed(self) -> int:
        """See :class:`Rule`."""
        return 2 * self.malicious + 3

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.malicious < 0 or self.keep < 1:
            raise AggregationError(
                f"krum needs malicious of at least 0 and keep of at least 1; they are "
                f"{self.malicious} and {self.keep}."
            )

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        number = len(clients)
        if number < self.clients_needed:
            raise AggregationError(
                f"krum against {self.malicious} malicious clients needs at least "
                f"{self.clients_needed} clients in a round; there are {number}."
            )
        for client in clients[1:]:
            if client.modules.keys() != clients[0].modules.keys():
                raise AggregationError(
                    f"krum compares whole adapters, but client {client.client_id!r} and client "
                    f"{clients[0].client_id!r} hold different modules; a client that holds fewer "
                    "would seem nearer to everybody. Use norm-clipping, trimmed-mean or median."
                )
        distances = squared_distances(clients)
        distances.fill_diagonal_(math.inf)
        nearest = distances.sort(dim=1).values[:, : number - self.malicious - 2]
        best = nearest.sum(dim=1).sort(stable=True).indices[: self.keep]
        return [clients[index] for index in sorted(best.tolist())]


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiKrum(Rule):
    """Krum that keeps all but the ``malicious`` worst clients.

    Args:
        malicious: f; a round needs 2f + 3 clients.
    """

    name: ClassVar[str] = "multi-krum"
    measures_delta: ClassVar[bool] = True
    whole_adapters: ClassVar[bool] = True

    malicious: int = 1

    def __str__(self) -> str:
        """See :class:`Rule`."""
        return f"{self.name} against {self.malicious} malicious clients"

    @property
    def clients_needed(self) -> int:
        """See :class:`Rule`."""
        return 2 * self.malicious + 3

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        keep = max(1, len(clients) - self.malicious)
        return Krum(malicious=self.malicious, keep=keep)(clients)
