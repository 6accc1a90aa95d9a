"""Trimmed mean and median of every entry of the factors.

Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Dong Yin, Yudong Chen,
Kannan Ramchandran, Peter Bartlett. ICML 2018, arXiv 1803.01498.

The entries of ΔW would be an [out, in] matrix per client; those of A and B are compared instead,
which means something because all clients start the round from the same factors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors, Update
from flower_split.aggregation.core.lowrank import same_factors
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import AggregationError


def _check_same_start(rule: str, clients: Sequence[ClientUpdate]) -> None:
    first: dict[str, ClientUpdate] = {}
    for client in clients:
        for name, update in client.modules.items():
            other = first.setdefault(name, client)
            if not same_factors(update.received, other.modules[name].received):
                raise AggregationError(
                    f"{rule} compares the factors entry by entry, so all clients must have been "
                    f"sent the same; client {client.client_id!r} and client {other.client_id!r} "
                    "were not (mixed ranks or scales). Use krum or norm-clipping instead."
                )


def _coordinate_wise(
    name: str, clients: Sequence[ClientUpdate], centre: Callable[[Tensor], Tensor]
) -> list[ClientUpdate]:
    """Return one client whose every returned entry is the centre of the entries of those who hold it.

    Args:
        name: The new client's id.
        clients: The round's clients, all sent the same.
        centre: Maps [clients, ...] to [...].
    """
    _check_same_start(name, clients)
    weight = math.fsum(client.weight for client in clients)
    modules = {}
    for module in sorted({module for client in clients for module in client.modules}):
        held = [client.modules[module] for client in clients if module in client.modules]
        first, returned = held[0], [update.returned for update in held]
        centred = Factors(
            centre(torch.stack([one.A.double() for one in returned])),
            centre(torch.stack([one.B.double() for one in returned])),
            first.returned.scale,
        )
        modules[module] = Update(name, first.received, centred, weight)
    others = {}
    for key in sorted({key for client in clients for key in client.others}):
        pairs = [client.others[key] for client in clients if key in client.others]
        others[key] = (pairs[0][0], centre(torch.stack([returned for _, returned in pairs])))
    return [ClientUpdate(name, weight, modules, others)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedMean(Rule):
    """The mean of every entry without its smallest and largest values; weights do not count.

    Args:
        trim: Share of the clients cut at each end, in [0, 0.5).
    """

    name: ClassVar[str] = "trimmed-mean"
    entry_by_entry: ClassVar[bool] = True
    leaves_one: ClassVar[bool] = True

    trim: float = 0.2

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.trim < 0.5:
            raise AggregationError(f"trimmed-mean must be in [0, 0.5); it is {self.trim!r}.")

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""

        def centre(values: Tensor) -> Tensor:
            number = len(values)
            cut = int(self.trim * number + 1e-9)
            return values.sort(dim=0).values[cut : number - cut].mean(dim=0)

        return _coordinate_wise("trimmed-mean", clients, centre)


@dataclass(frozen=True, kw_only=True, slots=True)
class Median(Rule):
    """The median of every entry, the mean of the middle two for an even number of clients."""

    name: ClassVar[str] = "median"
    entry_by_entry: ClassVar[bool] = True
    leaves_one: ClassVar[bool] = True

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""

        def centre(values: Tensor) -> Tensor:
            low, high = (len(values) - 1) // 2, len(values) // 2
            ordered = values.sort(dim=0).values
            return (ordered[low] + ordered[high]) / 2

        return _coordinate_wise("median", clients, centre)
