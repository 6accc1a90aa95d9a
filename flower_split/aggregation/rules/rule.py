"""The interface of a robust rule, and the rules that only change weights.

A rule maps the clients of a round to other clients, so rules compose and work before any
aggregation method. Each sees a client's whole adapter, because a client is judged as a whole.
"""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule(ABC):
    """A transform of a round's clients.

    A configuration names a rule as ``name``, or as ``name=value`` where it has fields: the value is
    that of the first field, an ``int``, ``float`` or ``str``. A rule says what it needs, so that
    combinations that cannot work are refused before the run begins.
    """

    name: ClassVar[str]
    changes_weights: ClassVar[bool] = False  # it changes the clients' weights, and nothing else
    measures_delta: ClassVar[bool] = False  # it looks at ΔW = scale · B A, so it needs A and B
    entry_by_entry: ClassVar[bool] = False  # it compares factors: all of one rank and scale
    whole_adapters: ClassVar[bool] = False  # all clients must hold the same modules
    leaves_one: ClassVar[bool] = False  # it returns a single client
    works_alone: ClassVar[bool] = False  # it changes something even for a single client

    def __str__(self) -> str:
        """Say the rule as the subject of an error's sentence."""
        return self.name

    @property
    def clients_needed(self) -> int:
        """Return how many clients a round must have for the rule to work."""
        return 1

    @abstractmethod
    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Return the clients to aggregate instead.

        Args:
            clients: Checked updates in order of client; never modified.

        Raises:
            AggregationError: The rule cannot work on these clients; the reason is given.
        """


def _weighted(client: ClientUpdate, weight: float) -> ClientUpdate:
    modules = {name: replace(update, weight=weight) for name, update in client.modules.items()}
    return replace(client, weight=weight, modules=modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformWeights(Rule):
    """Every client counts the same, whatever it reports."""

    name: ClassVar[str] = "uniform"
    changes_weights: ClassVar[bool] = True

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        return [_weighted(client, 1.0) for client in clients]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampWeights(Rule):
    """No weight above a multiple of the median one, because clients report their own.

    Args:
        ratio: The multiple; at least 1.
    """

    name: ClassVar[str] = "clamp-weights"
    changes_weights: ClassVar[bool] = True

    ratio: float = 10.0

    def __post_init__(self) -> None:
        """Check the ratio."""
        if not self.ratio >= 1:
            raise AggregationError(f"clamp-weights must be at least 1; it is {self.ratio!r}.")

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        positive = [client.weight for client in clients if client.weight > 0]
        if not positive:
            return list(clients)
        bound = self.ratio * statistics.median(positive)
        return [_weighted(client, bound) if client.weight > bound else client for client in clients]
