"""The clients' gradients of a window: accumulated, screened and reduced to one.

A client's loss for a micro-batch is its summed token loss over a denominator ``d`` of its choice: the
micro-batch's own label tokens, or those of the whole optimizer step. With ``g`` the gradient of that
loss, ``d · g`` is the gradient of the sum, and the step's gradient over everything is
``Σ d·g / Σ n`` with ``n`` the label tokens: invariant to how examples are spread over micro-batches
and clients.

A client with cut layers of its own does not pass through all parameters. It gives nothing to the
others, and its tokens do not count there: each parameter's gradient is that of the data that passed
through it.

A client's numbers scale other clients' work in three ways: the denominator of its loss, its label
tokens, and the gradient itself. Tokens are bounded by the rows x positions that the trunk saw, when a
backward arrives (:func:`~flower_split.trunk.compute.checks.check_weights`); the other two are looked at
before a window is reduced, so that the window can be reduced again without the slot (:func:`faults`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.aggregation.core.outliers import above_median, median
from flower_split.aggregation.rules.rule import Rule
from flower_split.errors import ConfigError
from flower_split.trunk.compute.checks import largest_magnitude
from flower_split.trunk.compute.rule_groups import as_clients, groups_of

# Of one entry of a client's token-mean gradient, and of one trained weight. No training that works
# comes near it, and an fp32 norm over a trillion of such entries is still finite.
MAX_ENTRY = 1e12
_ROUNDING = 1e-9  # relative, of a client's sum of label tokens


@dataclass(slots=True)
class SlotGradient:
    """One slot's gradient in one window, summed over its micro-batches in their order.

    The sum is kept in units of the first micro-batch's denominator, so that a single micro-batch, or
    several with one denominator, add exactly as ``loss.backward()`` would.

    Args:
        covers: Which parameters the slot's calls pass through; None: all of them. One that they pass
            through may have no gradient all the same (an expert that got no token): it counts as 0.
    """

    covers: tuple[bool, ...] | None = None
    denominator: float = 0.0
    largest_denominator: float = 0.0  # of its micro-batches
    num_tokens: float = 0.0
    total: list[Tensor | None] = field(default_factory=list)  # fp32 or fp64, per parameter
    following: int = 0  # the micro-batch that is added next
    waiting_bytes: int = 0  # of gradients of later ones
    _waiting: dict[int, tuple[list[Tensor | None], float, float]] = field(default_factory=dict)

    def add(
        self,
        micro_batch: int,
        gradients: Sequence[Tensor | None],
        *,
        num_tokens: float,
        loss_denominator: float,
    ) -> None:
        """Add micro-batch ``micro_batch``; one that comes early waits for those before it."""
        wide = [None if g is None else widened(g) for g in gradients]
        if micro_batch != self.following:
            self.waiting_bytes += sum(g.nbytes for g in wide if g is not None)
        self._waiting[micro_batch] = (wide, num_tokens, loss_denominator)
        while self.following in self._waiting:
            self._fold(*self._waiting.pop(self.following))
            self.following += 1
        if not self._waiting:
            self.waiting_bytes = 0

    def _fold(self, gradients: list[Tensor | None], num_tokens: float, denominator: float) -> None:
        self.num_tokens += num_tokens
        self.largest_denominator = max(self.largest_denominator, denominator)
        if not self.total:
            self.denominator, self.total = denominator, gradients
            return
        scale = denominator / self.denominator
        self.total = sums_of(self.total, gradients, [scale] * len(gradients))

    def passes(self, index: int) -> bool:
        """Return whether the slot's calls pass through parameter ``index``."""
        return self.covers is None or self.covers[index]

    def mean_norm(self) -> float:
        """Return the L2 norm, over all parameters, of the mean over the slot's label tokens."""
        norms = [
            torch.linalg.vector_norm(total, dtype=torch.float64)  # fp32 squares overflow at 1e19
            for total in self.total
            if total is not None
        ]
        gathered = [norm.to(norms[0].device) for norm in norms]  # a trunk may lie on several
        norm = float(torch.linalg.vector_norm(torch.stack(gathered))) if norms else 0.0
        return norm * (self.denominator / self.num_tokens)


def widened(gradient: Tensor) -> Tensor:
    """Return a gradient in the dtype in which sums are kept: fp32, or its own fp64."""
    return gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.float()


def sums_of(
    totals: Sequence[Tensor | None], gradients: Sequence[Tensor | None], scales: Sequence[float]
) -> list[Tensor | None]:
    """Return ``total + scale · gradient`` of every parameter; None counts as 0.

    Scaled and then added, each rounded, as tensor by tensor; a GPU gets one kernel for many tensors.

    Args:
        totals: By parameter.
        gradients: By parameter.
        scales: By parameter.
    """
    result = list(totals)
    by_scale: dict[float, list[tuple[int, Tensor]]] = {}
    for index, (gradient, scale) in enumerate(zip(gradients, scales, strict=True)):
        if gradient is not None:
            by_scale.setdefault(scale, []).append((index, gradient))
    for scale, given in by_scale.items():
        tensors = [gradient for _, gradient in given]
        scaled = tensors if scale == 1.0 else torch._foreach_mul(tensors, scale)
        adding: list[tuple[int, Tensor, Tensor]] = []
        for (index, _), tensor in zip(given, scaled, strict=True):
            total = totals[index]
            if total is None:
                result[index] = tensor
            else:
                adding.append((index, total, tensor))
        if adding:
            added = torch._foreach_add([total for _, total, _ in adding], [t for _, _, t in adding])
            for (index, _, _), tensor in zip(adding, added, strict=True):
                result[index] = tensor
    return result


def fault(gradient: SlotGradient, *, whole_step: bool = True) -> str:
    """Return why a slot's gradient may not enter a step; empty: it may.

    Args:
        gradient: The slot's gradient, with all micro-batches of the window.
        whole_step: Whether the window holds whole optimizer steps of the client, so that a
            denominator above the window's label tokens weighs the slot by more than it has.
    """
    allowed = gradient.num_tokens * (1 + _ROUNDING)
    if whole_step and gradient.largest_denominator > allowed:
        return (
            f"its loss_denominator is {gradient.largest_denominator:g}, and may be at most the label "
            f"tokens that it declared in the window, {gradient.num_tokens:g}. Divide the summed loss "
            "by the label tokens of the micro-batch or of the optimizer step"
        )
    weight = gradient.denominator / gradient.num_tokens
    if not weight <= MAX_ENTRY:  # of a gradient of zeros as well: 0 times infinity is NaN
        return (
            f"its loss_denominator is {gradient.denominator:g} for {gradient.num_tokens:g} label tokens, "
            f"and may be at most {MAX_ENTRY:g} times as many"
        )
    largest = largest_magnitude([total for total in gradient.total if total is not None])
    mean = largest * weight
    if not mean <= MAX_ENTRY:  # NaN is not
        return (
            f"the largest entry of its gradient is {mean:g}, and may be at most {MAX_ENTRY:g}. Lower "
            "the learning rate, clip the gradients, or look at the client's data"
        )
    return ""


def given_by(
    slots: Sequence[int], gradients: Mapping[int, SlotGradient]
) -> dict[int, SlotGradient]:
    """Return the gradients of the slots that make a step; each must have one."""
    return {slot: gradients[slot] for slot in slots}


def faults(gradients: Mapping[int, SlotGradient], *, whole_step: bool = True) -> dict[int, str]:
    """Return the slots whose gradients may not enter a step, each with the reason."""
    found: dict[int, str] = {}
    for slot in sorted(gradients):
        why = fault(gradients[slot], whole_step=whole_step)
        if why:
            found[slot] = why
    return found


def outliers(gradients: Mapping[int, SlotGradient], factor: float) -> dict[int, str]:
    """Return the slots whose gradients are far above the window's median, each with the reason.

    Compared are the L2 norms of the token-mean gradients, in fp64. That of a slot with fewer label
    tokens than the median slot has more noise in it, and counts for less in the step: it is compared
    as it counts. Fewer than three slots have no majority, and nobody is blamed.

    Args:
        gradients: Those of a window without :func:`faults`.
        factor: Multiple of the median (``trunk.outlier-factor``); 0: there is no bound.
    """
    if factor == 0 or len(gradients) < 3:
        return {}
    pulls = pulls_of(gradients)
    return {
        slot: f"the norm of its gradient is {multiple:.4g} times the median of the window's "
        f"{len(gradients)} clients, and may be at most {factor:g} times (trunk.outlier-factor). "
        "Look at the client's data and its version of the app, or raise the key"
        for slot, multiple in above_median(pulls, factor).items()
    }


def pulls_of(gradients: Mapping[int, SlotGradient]) -> dict[int, float]:
    """Return the norms that :func:`outliers` compares, in slot order."""
    typical = median({slot: gradient.num_tokens for slot, gradient in gradients.items()})
    return {
        slot: gradients[slot].mean_norm() * min(1.0, gradients[slot].num_tokens / typical)
        for slot in sorted(gradients)
    }


def reduce_in_slot_order(slots: Mapping[int, SlotGradient]) -> list[Tensor | None]:
    """Return the window's gradient ``Σ nᵢ gᵢ / Σ nᵢ``, summed in slot order.

    Args:
        slots: Slot -> its gradient; ``num_tokens`` over all slots must be above 0.

    Returns:
        One tensor per parameter, fp32 or fp64, or ``None`` where no slot has a gradient. Both sums are over
        the slots that pass through the parameter.
    """
    count = len(next(iter(slots.values())).total)
    tokens = [
        sum(slots[slot].num_tokens for slot in sorted(slots) if slots[slot].passes(index))
        for index in range(count)
    ]
    result: list[Tensor | None] = [None] * count
    for slot in sorted(slots):
        given = slots[slot]
        passing = [
            total if given.passes(index) else None for index, total in enumerate(given.total)
        ]
        scales = [given.denominator / number if number else 0.0 for number in tokens]
        result = sums_of(result, passing, scales)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How the clients' gradients of a window become one.

    A client's gradient is the mean over its label tokens. It is clipped first; then come the rules,
    which are those that the strategy offers for the adapters; what is left is averaged by tokens.
    Where clients pass through different parameters, the rules look at each group of parameters that
    the same clients pass through by itself.

    Args:
        max_client_norm: L2 norm of one client's gradient over all parameters; 0: no clipping.
        rules: In their order; none: the token-weighted mean alone.
        exclude_bad: Whether a window goes on without a client whose gradient may not enter it
            (:func:`faults`, :func:`outliers`), where the quorum allows; else the round is
            given up.
        outlier_factor: How many times the median of the window's norms one client's may be, before it
            is such a client; 0: any.
    """

    max_client_norm: float = 0.0
    rules: tuple[Rule, ...] = ()
    exclude_bad: bool = True
    outlier_factor: float = 0.0

    def checked(self, *, batches: bool) -> "Reduction":
        """Return itself, once it is the plain mean by label tokens where that is needed.

        Args:
            batches: Whether the trunk computes window batches, which keep no gradient of one client.

        Raises:
            ConfigError: It would need those gradients.
        """
        if batches and (self.max_client_norm or self.rules):
            raise ConfigError(
                "trunk.window-batches keeps no gradient of one client, which trunk.reduction and "
                "trunk.max-client-grad-norm need. Leave them at their defaults, or turn it off."
            )
        return self

    def __call__(
        self, slots: Mapping[int, SlotGradient], factors: Mapping[int, float] | None = None
    ) -> list[Tensor | None]:
        """Return the window's gradient: a tensor per parameter, or None where nobody has one.

        Args:
            slots: Slot -> its gradient.
            factors: Slot -> how much its gradient counts, after clipping and before the rules; the
                denominator stays the label tokens, so the result is ``Σ s n g / Σ n``. None: all 1.

        Raises:
            AggregationError: A rule cannot work on so few clients.
        """
        clipped = {slot: self._clipped(slots[slot]) for slot in sorted(slots)}
        if factors is not None:
            clipped = {slot: _times(clipped[slot], factors[slot]) for slot in clipped}
        if not self.rules:
            return reduce_in_slot_order(clipped)
        result: list[Tensor | None] = [None] * len(next(iter(slots.values())).total)
        for members, indices in groups_of(clipped).items():
            clients = as_clients({slot: clipped[slot] for slot in members}, indices)
            for rule in self.rules:
                clients = rule(clients)
            total = math.fsum(client.weight for client in clients)
            for name in clients[0].others:
                mean = sum(client.others[name][1] * (client.weight / total) for client in clients)
                assert isinstance(mean, Tensor)
                result[int(name)] = mean.to(_dtype_of(int(name), slots))
        return result

    def _clipped(self, gradient: SlotGradient) -> SlotGradient:
        if self.max_client_norm == 0:
            return gradient
        norm = gradient.mean_norm()
        if norm <= self.max_client_norm:
            return gradient
        return _times(gradient, self.max_client_norm / norm)


def _dtype_of(index: int, slots: Mapping[int, SlotGradient]) -> torch.dtype:
    """Return the dtype of the slots' gradients of a parameter."""
    return next(t.dtype for g in slots.values() if (t := g.total[index]) is not None)


def _times(gradient: SlotGradient, factor: float) -> SlotGradient:
    """Return a slot's gradient with a factor, over the same tokens."""
    return SlotGradient(
        covers=gradient.covers,
        denominator=gradient.denominator * factor,
        num_tokens=gradient.num_tokens,
        total=gradient.total,
    )
