"""A rule: keep the clients with the most label tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Heaviest(Rule):
    """Keep ``count`` clients, those of the largest weights; of equal ones, the first."""

    name: ClassVar[str] = "heaviest"

    count: int

    def __post_init__(self) -> None:
        """Check the number."""
        if self.count < 1:
            raise AggregationError(f"heaviest must keep at least 1 client; it is {self.count}.")

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        heaviest = sorted(clients, key=lambda client: -client.weight)[: self.count]
        kept = {client.client_id for client in heaviest}
        return [client for client in clients if client.client_id in kept]
