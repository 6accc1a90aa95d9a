"""Staleness of an asynchronous arrival: its weight, and what that does to a round's aggregation.

John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Michael Rabbat, Mani Malek, Dzmitry Huba,
"Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (arXiv 2106.06639).

An arrival that was computed from version ``v`` of the global weights and is applied to version ``t`` has
staleness ``τ = t − v``, and counts ``s(τ) = (1 + τ)^−a``. The server's step is ``η · Σ s w Δ / Σ w``:
the denominator does not know staleness (with equal weights it is the buffer's size K, as in the paper),
so a stale buffer takes a shorter step, and one without staleness is the ordinary weighted mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flower_split.aggregation.core.client_updates import ClientUpdate
from flower_split.aggregation.core.factors import Update
from flower_split.config.strategy import STALENESS
from flower_split.config.validation import at_least, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Staleness:
    """How much an arrival of staleness τ counts.

    Args:
        name: ``polynomial``: ``(1 + τ)^−exponent``; ``constant``: 1.
        exponent: 0.5 gives the paper's ``1 / sqrt(1 + τ)``.
    """

    name: str = "polynomial"
    exponent: float = 0.5

    def __post_init__(self) -> None:
        """Check choice and range.

        Raises:
            ConfigError: One is out of range.
        """
        one_of("strategy.staleness", self.name, STALENESS)
        at_least("strategy.staleness-exponent", self.exponent, 0)

    def __call__(self, versions: int) -> float:
        """Return the weight of an arrival that is ``versions`` steps behind, in (0, 1]; 1 for none.

        Raises:
            ValueError: ``versions`` is negative: an arrival cannot come from the future.
        """
        if versions < 0:
            raise ValueError(f"staleness must be at least 0; it is {versions}.")
        return 1.0 if self.name == "constant" else float((1.0 + versions) ** -self.exponent)


@dataclass(frozen=True, slots=True)
class Discounted:
    """Clients whose changes count with a factor, and that may have begun at other versions.

    To be put before an aggregation that takes the weighted mean of changes. A client of weight w and
    factor s stays with weight ``s·w``, and beside it stands one of weight ``(1 − s)·w`` that changed
    nothing: then the mean of changes over both is ``Σ s w Δ / Σ w``, whatever the method does with
    ranks and server optimizers afterwards. A tensor that is no LoRA factor is moved to the current
    version: the mean of ``now + change`` over all.

    Args:
        factors: Client id to s, in (0, 1].
        now: The current global values of the tensors that are no LoRA factors, by name.
    """

    factors: Mapping[str | int, float]
    now: Mapping[str, Tensor]

    def __call__(self, clients: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """See :data:`flower_split.aggregation.core.client_updates.Transform`."""
        result: list[ClientUpdate] = []
        for client in clients:
            factor = self.factors[client.client_id]
            moved = {}
            for name, (received, returned) in client.others.items():
                now = self.now[name].double()
                moved[name] = (now, now + (returned - received))
            result.append(_weighted(client, client.client_id, factor, moved))
            if factor < 1.0:
                still = {name: (now, now) for name, (now, _) in moved.items()}
                idle = replace(
                    client,
                    modules={
                        module: replace(update, returned=update.received)
                        for module, update in client.modules.items()
                    },
                )
                result.append(_weighted(idle, f"{client.client_id}, discounted", 1 - factor, still))
        return result


def _weighted(
    client: ClientUpdate,
    client_id: str | int,
    factor: float,
    others: Mapping[str, tuple[Tensor, Tensor]],
) -> ClientUpdate:
    """Return ``client`` under another id, with its weight times ``factor``."""
    weight = client.weight * factor

    def renamed(update: Update) -> Update:
        return replace(update, client_id=client_id, weight=weight)

    return ClientUpdate(
        client_id,
        weight,
        {module: renamed(update) for module, update in client.modules.items()},
        others,
    )
