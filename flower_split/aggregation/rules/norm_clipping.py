"""Norm clipping: no client moves ΔW by more than a given length.

Can You Really Backdoor Federated Learning? Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh,
H. Brendan McMahan. 2019, arXiv 1911.07963.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Factors, Update
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import AggregationError


def _between(received: Tensor, returned: Tensor, share: float) -> Tensor:
    return (received.double() + share * (returned.double() - received.double())).float()


def _change_terms(update: Update) -> tuple[float, float, float]:
    """Return ‖L‖², ⟨L, M⟩ and ‖M‖² of the change γL + γ²M at share γ of the factors' change."""
    sent, back, scale = update.received, update.returned, update.returned.scale
    moved_a, moved_b = back.A.double() - sent.A.double(), back.B.double() - sent.B.double()
    linear = (
        torch.cat([moved_b, sent.B.double()], dim=1),
        torch.cat([sent.A.double(), moved_a], dim=0),
    )

    def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
        return float(((one[0].T @ two[0]) * (one[1] @ two[1].T)).sum()) * scale**2

    square = (moved_b, moved_a)
    return inner(linear, linear), inner(linear, square), inner(square, square)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormClipping(Rule):
    """Pull a client back towards what it received until its change is short enough.

    The length is that of the change of ΔW over all modules (and of the other tensors), not of the
    factors, whose length depends on how ΔW is factored. A and B are pulled back by one share for
    the whole client, so the rank stays what it was.

    Args:
        max_norm: The longest change, Frobenius.
    """

    name: ClassVar[str] = "norm-clipping"
    measures_delta: ClassVar[bool] = True
    works_alone: ClassVar[bool] = True

    max_norm: float

    def __post_init__(self) -> None:
        """Check the bound."""
        if not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise AggregationError(f"norm-clipping must be above 0; it is {self.max_norm!r}.")

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :class:`Rule`."""
        return [self._clipped(client) for client in clients]

    def _clipped(self, client: ClientUpdate) -> ClientUpdate:
        terms = [_change_terms(update) for update in client.modules.values()]
        second, third, fourth = (
            (sum(column) for column in zip(*terms, strict=True))
            if terms
            else (
                0.0,
                0.0,
                0.0,
            )
        )
        second += sum(
            float((returned - received).square().sum())
            for received, returned in client.others.values()
        )

        def squared_norm(share: float) -> float:
            return share**2 * (second + share * (2 * third + share * fourth))

        bound = self.max_norm**2
        if squared_norm(1.0) <= bound:
            return client
        low, high = 0.0, 1.0  # the norm is within the bound at low, above it at high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if squared_norm(middle) <= bound else (low, middle)
        modules = {}
        for name, update in client.modules.items():
            sent, back = update.received, update.returned
            pulled = Factors(
                _between(sent.A, back.A, low), _between(sent.B, back.B, low), back.scale
            )
            modules[name] = replace(update, returned=pulled)
        others = {
            name: (received, received + low * (returned - received))
            for name, (received, returned) in client.others.items()
        }
        return replace(client, modules=modules, others=others)
