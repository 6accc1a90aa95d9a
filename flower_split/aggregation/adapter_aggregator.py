"""Aggregate a whole adapter: every module by one method, every other tensor by its weighted mean.

A round, as the strategy drives it::

    aggregator = AdapterAggregator("product-delta", scales, max_rank=16)
    aggregator.init(initial_adapter)                       # once, or load_state_dict(checkpoint)
    sent = aggregator.distribute()                         # per client: its ranks and scales
    aggregator.aggregate([AdapterUpdate("a", sent, returned, weight=120), ...])

Clients are summed in the order of their ids, whatever the order they are handed over in. Clients
may hold only some of the modules: a module is aggregated over the clients that hold it, with their
weights made to sum to 1 among them, and keeps its state, moments included, in a round in which
nobody holds it (or nobody of weight above 0).
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from flower_split.aggregation import aggregator_state
from flower_split.aggregation.aggregator_state import AggregatorState
from flower_split.aggregation.core.adapter_layout import (
    BIAS,
    Layout,
    factors_from,
    factors_into,
    layout_of,
)
from flower_split.aggregation.core.checks import shares_of
from flower_split.aggregation.core.client_updates import (
    AdapterSpec,
    AdapterUpdate,
    Admission,
    ClientUpdate,
    Transform,
    named,
)
from flower_split.aggregation.core.factors import Factors, State, Update
from flower_split.aggregation.core.lowrank import LowRankSum, factors_of, inner_product
from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.core.outliers import Outliers
from flower_split.aggregation.core.plain_tensors import mean_plain_tensors
from flower_split.aggregation.core.round_summary import RoundSummary
from flower_split.aggregation.methods.product_family import ProductAggregator
from flower_split.aggregation.methods.registry import make_aggregator
from flower_split.errors import AggregationError

__all__ = ["AdapterAggregator", "AdapterSpec", "AdapterUpdate", "RoundSummary"]

CPU = torch.device("cpu")

SPARE_RANK = 4
"""Server rank in units of the adapter's largest rank, unless ``max_rank`` says otherwise."""


class AdapterAggregator:
    """The server's adapter over all rounds.

    Args:
        name: The method, as :func:`make_aggregator` knows it or made it.
        scales: Module name → ΔW scale of the adapter that :meth:`init` will get.
        max_rank: Of a method given by name: the largest rank the server keeps per module; None:
            four times the largest rank of the initial adapter for methods that keep ΔW itself, so
            that directions too faint for this round's clients can add up over rounds.
        transforms: What happens to the clients' updates before they are aggregated, in order, such
            as the rules of ``flower_split.aggregation.rules.parse``.
        on_invalid: ``refuse`` raises at the first client whose update is malformed; ``exclude``
            leaves such clients out, and the result is that of the others alone.
        workers: Threads over modules; the result does not depend on it.
        device: Where states live and sums run, such as ``cuda``; adapters come and go on the CPU.
        outlier_factor: A client that moved its adapter by more than this many times the median of the
            round's clients is treated as a malformed update is; 0: there is no such bound.
        options: Of a method given by name: its own options.
    """

    def __init__(
        self,
        name: str | Aggregator,
        scales: Mapping[str, float],
        *,
        max_rank: int | None = None,
        transforms: Sequence[Transform] = (),
        on_invalid: str = "refuse",
        workers: int = 1,
        device: str = "cpu",
        outlier_factor: float = 0.0,
        **options: int | float | str | None,
    ) -> None:
        if on_invalid not in ("refuse", "exclude"):
            raise AggregationError(f"on_invalid must be refuse or exclude; it is {on_invalid!r}.")
        self.method = (
            make_aggregator(name, max_rank=max_rank, **options) if isinstance(name, str) else name
        )
        self._scales = dict(scales)
        self._transforms = tuple(transforms)
        self._exclude = on_invalid == "exclude"
        self._workers = workers
        self._device = torch.device(device)
        self._outliers = Outliers(outlier_factor, factors=bool(self.method.private))
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
            with named(module):
                factors = factors_from(adapter, module, suffixes, self._scales[module])
                self._states[module] = self.method.init(factors.to(self._device))
        self._others = {name: adapter[name].detach().clone() for name in self._layout.others}

    def distribute(
        self,
        ranks: Mapping[str, int] | int | None = None,
        scales: Mapping[str, float] | None = None,
        modules: frozenset[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the adapter for one client, sorted by name; equal arguments give equal tensors.

        Args:
            ranks: As in :class:`AdapterSpec`.
            scales: As in :class:`AdapterSpec`.
            modules: As in :class:`AdapterSpec`.

        Raises:
            AggregationError: The method cannot serve a rank, or a module is unknown.
        """
        self._ready()
        held = self._layout.held(modules, "a client")
        adapter = {name: self._others[name] for name in held.others}
        for module in held.modules:
            state = self._states[module]
            rank = ranks.get(module) if isinstance(ranks, Mapping) else ranks
            scale = self._scale(module, scales)
            with named(module):
                factors = self.method.distribute(state, rank, scale)
            factors_into(adapter, module, self._layout, factors.to(CPU))
            if module + BIAS in adapter:  # the bias of B is multiplied by the scale as well
                adapter[module + BIAS] = adapter[module + BIAS] * (self._scales[module] / scale)
        return {name: adapter[name].detach().clone() for name in sorted(adapter)}

    def aggregate(
        self, updates: Sequence[AdapterUpdate], then: Sequence[Transform] = ()
    ) -> RoundSummary:
        """Aggregate one round over all modules; on an error nothing has changed.

        Args:
            updates: One per client, in any order.
            then: Further transforms, of this round only, after the aggregator's own.

        Raises:
            AggregationError: No usable update, a client twice, or (policy "refuse") a malformed
                one; client and module are named.
        """
        self._ready()
        start = time.perf_counter()
        clients, excluded = self._admission().admit(updates, exclude=self._exclude)
        clients, far = self._outliers.leave_out(clients, self._transforms)
        if far and not self._exclude:
            raise AggregationError(" ".join(far.values()))
        excluded |= far
        for transform in then:
            clients = list(transform(clients))
        # The weights of everybody: a round must have some, whoever holds what.
        shares_of([(client.client_id, client.weight) for client in clients])
        modules = [module for module in self._states if _weight_of(module, clients) > 0]

        def one(module: str) -> tuple[State, Factors | None]:
            of_module = [
                self._on_device(client.modules[module])
                for client in clients
                if module in client.modules
            ]
            with named(module):
                result = self.method.aggregate(self._states[module], of_module)
            if result.residual is None:
                return result.state, self._base.get(module)
            return result.state, self._grown_base(module, result.residual)

        if self._workers == 1:
            results = [one(module) for module in modules]
        else:
            # A new thread's first BLAS call does not know the thread count set in this one.
            threads = torch.get_num_threads()
            with ThreadPoolExecutor(
                self._workers, initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool:
                results = list(pool.map(one, modules))
        others = mean_plain_tensors(self._others, clients)
        for module, (state, base) in zip(modules, results, strict=True):
            self._states[module] = state
            if base is not None:
                self._base[module] = base
        self._others = others
        ids = tuple(client.client_id for client in clients)
        unchanged = tuple(module for module in self._states if module not in set(modules))
        seconds = time.perf_counter() - start
        return RoundSummary(ids, excluded, seconds, unchanged, self.truncation())

    def trainable(self) -> list[str]:
        """Return the names of the tensors that clients train in the coming round, and no others."""
        self._ready()
        names = list(self._layout.others)
        for module, state in self._states.items():
            names += self._names(module, self.method.trainable(state))
        return sorted(names)

    def private(self) -> list[str]:
        """Return the names of the tensors that stay with each client after the initial adapter.

        A client keeps its own values of these from round to round, ignores what ``distribute``
        holds for them, and need not return them.
        """
        self._ready()
        return sorted(
            name for module in self._states for name in self._names(module, self.method.private)
        )

    def core_columns(self) -> dict[str, Tensor]:
        """Return module name → the frozen P of B = P R, where clients train R alone in this round.

        Empty unless the method trains a core; see :meth:`Aggregator.core_columns`.
        """
        columns = {name: self.method.core_columns(state) for name, state in self._states.items()}
        return {name: found.to(CPU) for name, found in columns.items() if found is not None}

    def deltas(self) -> dict[str, Factors]:
        """Return module name → the global ΔW as factors, without what went into the base."""
        return {module: self.method.delta(state).to(CPU) for module, state in self._states.items()}

    def truncation(self) -> float:
        """Return which share of the global ΔW an adapter of the initial ranks leaves out.

        Frobenius norms, over all modules. The server of a method that recompresses ΔW keeps more than that
        from round to round (``max_rank``); an adapter has its leading components. Others: 0.
        """
        if not self.method.recompresses:
            return 0.0
        whole = beyond = 0.0
        for state in self._states.values():
            delta, rank = self.method.delta(state), int(state.basis.shape[0])
            rest = Factors(delta.A[rank:], delta.B[:, rank:], delta.scale)
            whole += max(inner_product(delta, delta), 0.0)
            beyond += max(inner_product(rest, rest), 0.0)
        return (beyond / whole) ** 0.5 if whole > 0 else 0.0

    def base_changes(self) -> dict[str, Factors]:
        """Return module name → what clients add to their frozen base weight, over all rounds.

        Empty unless the method changes the base. It is kept apart, in fp32, because a base in bf16
        would swallow most of it; it belongs into every exported adapter.
        """
        return {module: base.to(CPU) for module, base in self._base.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a checkpoint needs, as named tensors that share no memory."""
        self._ready()
        return aggregator_state.state_dict(
            self.method, AggregatorState(self._states, self._others, self._base)
        )

    def load_state_dict(self, tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`, bit for bit.

        Args:
            tensors: The checkpoint.
            adapter: The adapter that :meth:`init` got, for names and shapes only.

        Raises:
            AggregationError: The checkpoint lacks something.
        """
        self._adopt(adapter)
        state = aggregator_state.load_state_dict(self.method, tensors, self._layout, self._device)
        self._states, self._others = dict(state.modules), dict(state.others)
        self._base = dict(state.base)

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
        if isinstance(self.method, ProductAggregator) and self.method.max_rank is None:
            ranks = [
                factors_from(adapter, module, suffixes, 1.0).rank
                for module, suffixes in self._layout.modules.items()
            ]
            if ranks:
                self.method = replace(self.method, max_rank=SPARE_RANK * max(ranks))

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

    def _admission(self) -> Admission:
        shapes = {
            module: (state.out_features, state.in_features)
            for module, state in self._states.items()
        }
        optional = frozenset(self._layout.shapes) - set(self.trainable()) | set(self.private())
        return Admission(self._layout, self._scales, shapes, optional)

    def _on_device(self, update: Update) -> Update:
        if self._device == CPU:
            return update
        return replace(
            update,
            received=update.received.to(self._device),
            returned=update.returned.to(self._device),
        )

    def _grown_base(self, module: str, residual: Factors) -> Factors:
        """Return the base change with one round's residual added, recompressed without loss."""
        total = LowRankSum(residual.out_features, residual.in_features)
        if module in self._base:
            total.add(self._base[module], 1.0)
        total.add(residual, 1.0)
        return factors_of(total.spectrum(), 1.0)


def _weight_of(module: str, clients: Sequence[ClientUpdate]) -> float:
    """Return the largest weight among the clients that hold a module; 0: nobody does."""
    return max((client.weight for client in clients if module in client.modules), default=0.0)
