"""A client's update of a whole adapter: as it comes from the wire, and as modules after checking."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.aggregation.core.adapter_layout import BIAS, Layout, check_names, factors_from
from flower_split.aggregation.core.checks import check_factors, check_weight, client_order
from flower_split.aggregation.core.factors import Update
from flower_split.errors import AggregationError


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What one client holds of the adapter: the server sends it exactly this.

    Args:
        ranks: The client's rank, one for all modules or per module; None, or a module that is not
            named: the rank of the initial adapter.
        scales: The client's scale of ΔW per module; None, or not named: the aggregator's.
        modules: The modules it holds; None: all. Their biases and magnitudes go with them; tensors
            that belong to no module go to every client.
    """

    ranks: Mapping[str, int] | int | None = None
    scales: Mapping[str, float] | None = None
    modules: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterUpdate:
    """What one client did with its whole adapter in one round.

    Args:
        client_id: Names the client in errors, and orders the sums; unique in a round.
        received: The adapter the server sent to this client, by tensor name.
        returned: The adapter the client sent back: exactly the tensors that it received. Those
            that the method freezes or that stay with the client may be left out; what was
            received stands in for them.
        weight: Tokens, examples, or 1.
        scales: The client's own scale per module; None: those of the aggregator.
        modules: The modules that the client holds, and so was sent; None: all.
    """

    client_id: str | int
    received: Mapping[str, Tensor]
    returned: Mapping[str, Tensor]
    weight: float
    scales: Mapping[str, float] | None = None
    modules: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ClientUpdate:
    """A checked update of a whole adapter, module by module.

    Args:
        client_id: As in the adapter update.
        weight: As in the adapter update.
        modules: Module name → its update, of the modules that the client holds; all carry this
            client's id and weight.
        others: Name → (received, returned) of the tensors it holds that are no LoRA factor, in
            fp64, at the aggregator's scales.
    """

    client_id: str | int
    weight: float
    modules: Mapping[str, Update]
    others: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@contextmanager
def named(place: str) -> Iterator[None]:
    """Put a module's name before any aggregation error."""
    try:
        yield
    except AggregationError as error:
        raise AggregationError(f"{place}: {error}") from error


@dataclass(frozen=True, slots=True)
class Admission:
    """What every update of a run must look like.

    Args:
        layout: The modules and other tensors of the adapter.
        scales: Module name → scale where a client has none of its own.
        shapes: Module name → [out, in].
        optional: Names that a client need not return.
    """

    layout: Layout
    scales: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int]]
    optional: frozenset[str]

    def admit(
        self, updates: Sequence[AdapterUpdate], *, exclude: bool
    ) -> tuple[list[ClientUpdate], dict[str | int, str]]:
        """Return the well-formed updates in order of client, and why the others are not.

        Args:
            updates: One per client, in any order.
            exclude: Leave malformed updates out instead of raising.

        Raises:
            AggregationError: A client is there twice, an update is malformed (unless excluded), or
                none is left.
        """
        ordered = sorted(updates, key=lambda update: client_order(update.client_id))
        ids = [update.client_id for update in ordered]
        twice = {repr(one) for one, two in zip(ids, ids[1:], strict=False) if one == two}
        if twice:
            raise AggregationError(f"client {', '.join(sorted(twice))} is in this round twice.")
        clients: list[ClientUpdate] = []
        excluded: dict[str | int, str] = {}
        for update in ordered:
            try:
                clients.append(self.checked(update))
            except AggregationError as error:
                if not exclude:
                    raise
                excluded[update.client_id] = str(error)
        if not clients:
            raise AggregationError("no client update to aggregate. " + " ".join(excluded.values()))
        return clients, excluded

    def checked(self, client: AdapterUpdate) -> ClientUpdate:
        """Return one update, module by module.

        Raises:
            AggregationError: It is malformed by itself; client and module are named.
        """
        who = f"client {client.client_id!r}"
        held = self.layout.held(client.modules, who)
        expected = held.shapes
        check_names(client.received, expected, f"{who} received an adapter that")
        returned = set(client.returned) | (self.optional & expected.keys())
        check_names(returned, expected, f"{who} returned an adapter that")
        weight = check_weight(client.client_id, client.weight)
        modules = {}
        for module in held.modules:
            with named(module):
                modules[module] = self._module(client, module, weight, who)
        others = {name: self._other(client, name, who) for name in held.others}
        return ClientUpdate(client.client_id, weight, modules, others)

    def _module(self, client: AdapterUpdate, module: str, weight: float, who: str) -> Update:
        suffixes = self.layout.modules[module]
        scale = self.scales[module]
        if client.scales is not None:
            scale = client.scales.get(module, scale)
        returned = {
            name: client.returned.get(name, client.received[name])
            for name in (module + suffix for suffix in suffixes)
        }
        update = Update(
            client.client_id,
            factors_from(client.received, module, suffixes, scale),
            factors_from(returned, module, suffixes, scale),
            weight,
        )
        for verb, factors in (("received", update.received), ("returned", update.returned)):
            check_factors(factors, f"{who} {verb} factors")
            if (factors.out_features, factors.in_features) != self.shapes[module]:
                raise AggregationError(
                    f"{who} {verb} factors of a ΔW of shape "
                    f"{[factors.out_features, factors.in_features]}; this module's is "
                    f"{list(self.shapes[module])}."
                )
        if update.received.rank != update.returned.rank:
            raise AggregationError(
                f"{who} received rank {update.received.rank} and returned rank "
                f"{update.returned.rank}; a client keeps the rank it was given."
            )
        return update

    def _other(self, client: AdapterUpdate, name: str, who: str) -> tuple[Tensor, Tensor]:
        pair = []
        for verb, value in (
            ("received", client.received[name]),
            ("returned", client.returned[name]),
        ):
            wanted = self.layout.shapes[name]
            if tuple(value.shape) != wanted or not value.is_floating_point():
                raise AggregationError(
                    f"{who} {verb} {name} as {value.dtype} {list(value.shape)}; it must be "
                    f"floating {list(wanted)}."
                )
            if not bool(torch.isfinite(value).all()):
                raise AggregationError(f"{who} {verb} {name} with NaN or Inf in it.")
            pair.append(value.detach().to("cpu", torch.float64) * self._bias_ratio(client, name))
        return pair[0], pair[1]

    def _bias_ratio(self, client: AdapterUpdate, name: str) -> float:
        """Return what a bias of B is multiplied with, so that it is averaged at one scale."""
        module = name.removesuffix(BIAS)
        if client.scales is None or not name.endswith(BIAS) or module not in self.scales:
            return 1.0
        return client.scales.get(module, self.scales[module]) / self.scales[module]


Transform = Callable[[Sequence[ClientUpdate]], Sequence[ClientUpdate]]
"""What may happen to the updates of a round before they are aggregated."""
