"""Aggregate a whole adapter: every module by one method, every other tensor by its weighted mean.

A round, as the strategy drives it::

    aggregator = AdapterAggregator("product-delta", scales, max_rank=16)
    aggregator.init(initial_adapter)                       # once, or load_state_dict(checkpoint)
    sent = aggregator.distribute()                         # per client: its ranks and scales
    aggregator.aggregate([AdapterUpdate("a", sent, returned, weight=120), ...])

Clients are summed in the order of their ids, whatever the order they are handed over in.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.aggregation.adapters import (
    BIAS,
    Layout,
    check_names,
    factors_from,
    factors_into,
    layout_of,
)
from flower_split.aggregation.checks import check_factors, check_weight, client_order, shares_of
from flower_split.aggregation.factors import Factors, State, Update
from flower_split.aggregation.lowrank import LowRankSum, factors_of
from flower_split.aggregation.registry import make_aggregator
from flower_split.errors import AggregationError

SEPARATOR = "::"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterUpdate:
    """What one client did with its whole adapter in one round.

    Args:
        client_id: Names the client in errors, and orders the sums; unique in a round.
        received: The adapter the server sent to this client, by tensor name.
        returned: The adapter the client sent back. Tensors that the method freezes or that stay
            with the client may be left out; what was received stands in for them.
        weight: Tokens, examples, or 1.
        scales: The client's own scale per module; None: those of the aggregator.
    """

    client_id: str | int
    received: Mapping[str, Tensor]
    returned: Mapping[str, Tensor]
    weight: float
    scales: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """What a round's aggregation did.

    Args:
        clients: The ids whose updates were used, in the order of summation.
        excluded: Client id → why its update was left out (policy "exclude" only).
        seconds: Wall-clock time of the aggregation.
    """

    clients: tuple[str | int, ...]
    excluded: Mapping[str | int, str] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def _named(module: str) -> Iterator[None]:
    """Put the module's name into any aggregation error."""
    try:
        yield
    except AggregationError as error:
        raise AggregationError(f"{module}: {error}") from error


class AdapterAggregator:
    """The server's adapter over all rounds.

    Args:
        name: The method, as :func:`make_aggregator` knows it.
        scales: Module name → ΔW scale of the adapter that :meth:`init` will get.
        max_rank: The largest rank the server keeps per module; None: whatever the method needs.
        on_invalid: ``refuse`` raises at the first client whose update is malformed; ``exclude``
            leaves such clients out, and the result is that of the others alone.
        workers: Threads over modules; the result does not depend on it.
        options: The method's own options.
    """

    def __init__(
        self,
        name: str,
        scales: Mapping[str, float],
        *,
        max_rank: int | None = None,
        on_invalid: str = "refuse",
        workers: int = 1,
        **options: int | float | str | None,
    ) -> None:
        if on_invalid not in ("refuse", "exclude"):
            raise AggregationError(f"on_invalid must be refuse or exclude; it is {on_invalid!r}.")
        self.method = make_aggregator(name, max_rank=max_rank, **options)
        self._scales = dict(scales)
        self._exclude = on_invalid == "exclude"
        self._workers = workers
        self._layout = Layout({}, (), {})
        self._states: dict[str, State] = {}
        self._others: dict[str, Tensor] = {}
        self._base: dict[str, Factors] = {}

    def init(self, adapter: Mapping[str, Tensor]) -> None:
        """Start from an adapter; call once, before anything else.

        Raises:
            AggregationError: A module has no scale or half its factors, or a value is invalid.
        """
        self._adopt(adapter)
        for module, suffixes in self._layout.modules.items():
            with _named(module):
                factors = factors_from(adapter, module, suffixes, self._scales[module])
                self._states[module] = self.method.init(factors)
        self._others = {name: adapter[name].detach().clone() for name in self._layout.others}

    def distribute(
        self,
        ranks: Mapping[str, int] | int | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """The adapter for one client, sorted by name; equal arguments give equal tensors.

        Args:
            ranks: The client's rank, one for all modules or per module; None: the initial ranks.
            scales: The client's scale per module; None: the aggregator's.

        Raises:
            AggregationError: The method cannot serve a rank.
        """
        self._ready()
        adapter = dict(self._others)
        for module, state in self._states.items():
            rank = ranks.get(module) if isinstance(ranks, Mapping) else ranks
            scale = self._scale(module, scales)
            with _named(module):
                factors = self.method.distribute(state, rank, scale)
            factors_into(adapter, module, self._layout, factors)
            if module + BIAS in adapter:  # the bias of B is multiplied by the scale as well
                adapter[module + BIAS] = adapter[module + BIAS] * (self._scales[module] / scale)
        return {name: adapter[name].detach().clone() for name in sorted(adapter)}

    def aggregate(self, updates: Sequence[AdapterUpdate]) -> RoundSummary:
        """One round over all modules; on an error nothing has changed.

        Args:
            updates: One per client, in any order.

        Raises:
            AggregationError: No usable update, a client twice, or (policy "refuse") a malformed
                one; client and module are named.
        """
        self._ready()
        start = time.perf_counter()
        clients, excluded = self._admit(updates)
        modules = list(self._states)
        per_module = [
            [self._module_update(client, module) for client in clients] for module in modules
        ]

        def one(index: int) -> tuple[State, Factors | None]:
            module = modules[index]
            with _named(module):
                result = self.method.aggregate(self._states[module], per_module[index])
            if result.residual is None:
                return result.state, self._base.get(module)
            return result.state, self._grown_base(module, result.residual)

        with ThreadPoolExecutor(self._workers) as pool:
            results = list(pool.map(one, range(len(modules))))
        others = self._mean_others(clients)
        for module, (state, base) in zip(modules, results, strict=True):
            self._states[module] = state
            if base is not None:
                self._base[module] = base
        self._others = others
        ids = tuple(client.client_id for client in clients)
        return RoundSummary(ids, excluded, time.perf_counter() - start)

    def trainable(self) -> list[str]:
        """Names of the tensors that clients train in the coming round; they freeze the others."""
        self._ready()
        names = list(self._layout.others)
        for module, state in self._states.items():
            names += self._names(module, self.method.trainable(state))
        return sorted(names)

    def private(self) -> list[str]:
        """Names of the tensors that stay with each client after the initial adapter.

        A client keeps its own values of these from round to round, ignores what ``distribute``
        holds for them, and need not return them.
        """
        self._ready()
        return sorted(
            name for module in self._states for name in self._names(module, self.method.private)
        )

    def deltas(self) -> dict[str, Factors]:
        """Module name → the global ΔW as factors, without what went into the base."""
        return {module: self.method.delta(state) for module, state in self._states.items()}

    def base_changes(self) -> dict[str, Factors]:
        """Module name → what clients add to their frozen base weight, over all rounds so far.

        Empty unless the method changes the base. It is kept apart, in fp32, because a base in bf16
        would swallow most of it; it belongs into every exported adapter.
        """
        return dict(self._base)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, as named tensors."""
        self._ready()
        tensors = {f"other{SEPARATOR}{name}": value for name, value in self._others.items()}
        for module, state in self._states.items():
            for key, value in self.method.state_dict(state).items():
                tensors[SEPARATOR.join(("lora", module, key))] = value
        for module, base in self._base.items():
            tensors[SEPARATOR.join(("base", module, "A"))] = base.A
            tensors[SEPARATOR.join(("base", module, "B"))] = base.B
        return {name: tensors[name].contiguous() for name in sorted(tensors)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`, bit for bit.

        Args:
            tensors: The checkpoint.
            adapter: The adapter that :meth:`init` got, for names and shapes only.

        Raises:
            AggregationError: The checkpoint lacks something.
        """
        self._adopt(adapter)
        groups: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(SEPARATOR)
            owner, _, key = rest.partition(SEPARATOR)
            groups.setdefault((kind, owner), {})[key] = value
        for module in self._layout.modules:
            with _named(module):
                state = self.method.load_state_dict(groups.get(("lora", module), {}))
            self._states[module] = state
            if ("base", module) in groups:
                base = groups["base", module]
                self._base[module] = Factors(base["A"], base["B"])
        stored = {owner: group[""] for (kind, owner), group in groups.items() if kind == "other"}
        check_names(stored, self._layout.others, "the checkpoint")
        self._others = {name: stored[name].clone() for name in self._layout.others}

    # ---- below: one step each of the above

    def _adopt(self, adapter: Mapping[str, Tensor]) -> None:
        self._layout = layout_of(adapter)
        if not self._layout.modules and not self._layout.others:
            raise AggregationError("the initial adapter is empty: there is nothing to aggregate.")
        without = sorted(set(self._layout.modules) - set(self._scales))
        if without:
            raise AggregationError(
                f"no scale for {', '.join(without[:4])}; the scale (alpha / r) is not in the "
                "adapter's state, so it must be given for every module."
            )

    def _ready(self) -> None:
        if not self._layout.shapes:
            raise AggregationError("the aggregator has no adapter yet; call init first.")

    def _scale(self, module: str, scales: Mapping[str, float] | None) -> float:
        own = self._scales[module]
        return own if scales is None else scales.get(module, own)

    def _names(self, module: str, parts: frozenset[str]) -> list[str]:
        suffixes = dict(zip(("A", "B"), self._layout.modules[module], strict=True))
        if suffixes["A"].startswith(".lora_embedding"):
            suffixes = {"A": suffixes["B"], "B": suffixes["A"]}
        return [module + suffixes[part] for part in sorted(parts)]

    def _module_update(self, client: AdapterUpdate, module: str) -> Update:
        suffixes = self._layout.modules[module]
        scale = self._scale(module, client.scales)
        returned = {
            name: client.returned.get(name, client.received[name])
            for name in (module + suffix for suffix in suffixes)
        }
        return Update(
            client.client_id,
            factors_from(client.received, module, suffixes, scale),
            factors_from(returned, module, suffixes, scale),
            client.weight,
        )

    def _admit(
        self, updates: Sequence[AdapterUpdate]
    ) -> tuple[list[AdapterUpdate], dict[str | int, str]]:
        """The well-formed updates in order of client, and why the others are not."""
        ordered = sorted(updates, key=lambda update: client_order(update.client_id))
        ids = [update.client_id for update in ordered]
        twice = {repr(one) for one, two in zip(ids, ids[1:], strict=False) if one == two}
        if twice:
            raise AggregationError(f"client {', '.join(sorted(twice))} is in this round twice.")
        clients: list[AdapterUpdate] = []
        excluded: dict[str | int, str] = {}
        for update in ordered:
            try:
                self._check(update)
                clients.append(update)
            except AggregationError as error:
                if not self._exclude:
                    raise
                excluded[update.client_id] = str(error)
        if not clients:
            raise AggregationError("no client update to aggregate. " + " ".join(excluded.values()))
        return clients, excluded

    def _check(self, client: AdapterUpdate) -> None:
        """Refuse an update that is malformed by itself."""
        who = f"client {client.client_id!r}"
        optional = set(self._layout.shapes) - set(self.trainable()) | set(self.private())
        check_names(client.received, self._layout.shapes, f"{who} received an adapter that")
        check_names(
            set(client.returned) | optional,
            self._layout.shapes,
            f"{who} returned an adapter that",
        )
        check_weight(client.client_id, client.weight)
        for module, state in self._states.items():
            with _named(module):
                update = self._module_update(client, module)
                for verb, factors in (("received", update.received), ("returned", update.returned)):
                    check_factors(factors, f"{who} {verb} factors")
                    shape = [factors.out_features, factors.in_features]
                    if shape != [state.out_features, state.in_features]:
                        raise AggregationError(
                            f"{who} {verb} factors of a ΔW of shape {shape}; this module's is "
                            f"{[state.out_features, state.in_features]}."
                        )
                if update.received.rank != update.returned.rank:
                    raise AggregationError(
                        f"{who} received rank {update.received.rank} and returned rank "
                        f"{update.returned.rank}; a client keeps the rank it was given."
                    )
        for name in self._layout.others:
            value, wanted = client.returned[name], self._layout.shapes[name]
            if tuple(value.shape) != wanted or not value.is_floating_point():
                raise AggregationError(
                    f"{who} returned {name} as {value.dtype} {list(value.shape)}; it must be "
                    f"floating {list(wanted)}."
                )
            if not bool(torch.isfinite(value).all()):
                raise AggregationError(f"{who} returned {name} with NaN or Inf in it.")

    def _mean_others(self, clients: Sequence[AdapterUpdate]) -> dict[str, Tensor]:
        """The weighted mean of every tensor that is no LoRA factor, summed in fp64."""
        shares = shares_of([(client.client_id, client.weight) for client in clients])
        means: dict[str, Tensor] = {}
        for name in self._layout.others:
            module = name.removesuffix(BIAS)
            total = torch.zeros(self._layout.shapes[name], dtype=torch.float64)
            for client, share in zip(clients, shares, strict=True):
                if module in self._states:
                    share *= self._scale(module, client.scales) / self._scales[module]
                total += share * client.returned[name].detach().to("cpu", torch.float64)
            means[name] = total.to(self._others[name].dtype)
        return means

    def _grown_base(self, module: str, residual: Factors) -> Factors:
        """The base change with one round's residual added, recompressed without loss."""
        total = LowRankSum(residual.out_features, residual.in_features)
        if module in self._base:
            total.add(self._base[module], 1.0)
        total.add(residual, 1.0)
        return factors_of(total.spectrum(), 1.0)
