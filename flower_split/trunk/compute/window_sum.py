"""The gradient of a window whose clients' micro-batches are computed together.

What is kept is ``Σ d g`` over all clients at once, and no gradient of one client. So that somebody can
leave a window after having contributed, the passes keep their inputs and the gradients of their outputs
until the window has stepped: then the sum is taken again without that client's rows.

Clients with cut layers of their own pass through other parameters, and have a sum of their own.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from flower_split.aggregation.core.outliers import above_median, median
from flower_split.split import CutLayers
from flower_split.trunk.compute.gradients import SlotGradient, fault, outliers, sums_of, widened
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.compute.joint_pass import JointPass, PassGradient

Covers = Callable[[CutLayers], tuple[bool, ...] | None]


@dataclass(slots=True)
class Counts:
    """What one slot has given to the open window, in numbers."""

    cuts: CutLayers | None
    num_tokens: float = 0.0
    largest_denominator: float = 0.0
    norms_squared: float = 0.0  # Σ over its micro-batches of ‖d · smashed_grad‖²

    def smashed_rms(self) -> float:
        """Return the root mean square, over its label tokens, of its smashed gradients of summed loss."""
        return math.sqrt(self.norms_squared / self.num_tokens)


@dataclass(frozen=True, slots=True)
class Counted:
    """One slot's micro-batch that counts, in numbers."""

    slot: int
    num_tokens: float
    denominator: float
    norm_squared: float = 0.0


@dataclass(slots=True)
class _Kept:
    micro_batch: int
    passes: Sequence[JointPass]
    tokens: Mapping[int, float]  # slot -> label tokens of its micro-batch


@dataclass(slots=True)
class WindowSum:
    """The open window's gradient. Only the compute thread changes it.

    Args:
        joint: Computes passes.
        covers: Which parameters the calls with given cut layers pass through; None: all.
    """

    joint: Joint
    covers: Covers
    counts: dict[int, Counts] = field(default_factory=dict)  # by slot
    times_again: int = 0  # that a window's sum was taken again, over the round
    _sums: dict[CutLayers | None, SlotGradient] = field(default_factory=dict)
    _kept: list[_Kept] = field(default_factory=list)

    def add(
        self,
        micro_batch: int,
        passes: Sequence[JointPass],
        gradients: Sequence[PassGradient],
        counted: Sequence[Counted],
    ) -> None:
        """Add what a batch gives; micro-batches are summed in their order, whichever comes first.

        Args:
            micro_batch: Its index in the window; each is added once.
            passes: The batch's passes, after their backward.
            gradients: What they give.
            counted: The slots whose rows are in it.
        """
        cuts_of = {rows.slot: one.cuts for one in passes for rows in one.rows}
        for item in counted:
            mine = self.counts.setdefault(item.slot, Counts(cuts_of[item.slot]))
            mine.num_tokens += item.num_tokens
            mine.largest_denominator = max(mine.largest_denominator, item.denominator)
            mine.norms_squared += item.norm_squared
        tokens = {item.slot: item.num_tokens for item in counted}
        self._kept.append(_Kept(micro_batch, passes, tokens))
        self._fold(self._sums, micro_batch, gradients, cuts_of, tokens)

    def gradients(self, slots: Collection[int]) -> dict[int, SlotGradient]:
        """Return the window's sums over ``slots``, numbered in a fixed order, as a reduction takes them.

        Where somebody has contributed who is not among ``slots``, the sums are taken again.
        """
        if not self.counts.keys() <= set(slots):
            self.times_again += 1
            self._sums = self._sums_over(set(slots))
            self.counts = {slot: self.counts[slot] for slot in slots}
        return dict(enumerate(self._sums[cuts] for cuts in sorted(self._sums, key=_order)))

    def faults(self, slots: Iterable[int]) -> dict[int, str]:
        """Return the slots whose gradients may not enter a step, each with the reason."""
        slots = sorted(slots)
        found = {slot: why for slot in slots if (why := self._fault_of_counts(slot))}
        if found:
            return found
        sums = self.gradients(slots).values()
        if any(fault(total, whole_step=False) for total in sums):
            for slot in slots:  # the sum says that somebody is at fault, not who
                for alone in self._sums_over({slot}).values():
                    if why := fault(alone, whole_step=False):
                        found[slot] = why
        return found

    def outliers(self, slots: Sequence[int], factor: float) -> dict[int, str]:
        """Return the slots whose gradients are far above the window's median, each with the reason.

        Their smashed gradients, which are there, say whether somebody may be; only then is each slot's
        gradient computed by itself and compared, so that nobody is blamed by the first look alone.

        Args:
            slots: The window's.
            factor: Multiple of the median (``trunk.outlier-factor``); 0: there is no bound.
        """
        if factor == 0 or len(slots) < 3:
            return {}
        counts = {slot: self.counts[slot] for slot in slots}
        typical = median({slot: mine.num_tokens for slot, mine in counts.items()})
        pulls = {
            slot: mine.smashed_rms() * min(1.0, mine.num_tokens / typical)
            for slot, mine in counts.items()
        }
        if not above_median(pulls, factor):
            return {}
        each = {slot: next(iter(self._sums_over({slot}).values())) for slot in slots}
        return outliers(each, factor)

    def clear(self) -> None:
        """Forget a window: it has stepped, or the round is given up."""
        self.counts, self._sums, self._kept = {}, {}, []

    def _fault_of_counts(self, slot: int) -> str:
        mine = self.counts[slot]
        return fault(
            SlotGradient(
                denominator=mine.largest_denominator,
                largest_denominator=mine.largest_denominator,
                num_tokens=mine.num_tokens,
            )
        )

    def _sums_over(self, slots: set[int]) -> dict[CutLayers | None, SlotGradient]:
        sums: dict[CutLayers | None, SlotGradient] = {}
        for kept in sorted(self._kept, key=lambda item: item.micro_batch):
            gradients = [g for one in kept.passes for g in self.joint.again(one, slots)]
            tokens = {slot: n for slot, n in kept.tokens.items() if slot in slots}
            cuts_of = {rows.slot: one.cuts for one in kept.passes for rows in one.rows}
            self._fold(sums, kept.micro_batch, gradients, cuts_of, tokens)
        return sums

    def _fold(
        self,
        sums: dict[CutLayers | None, SlotGradient],
        micro_batch: int,
        gradients: Sequence[PassGradient],
        cuts_of: Mapping[int, CutLayers | None],
        tokens: Mapping[int, float],
    ) -> None:
        """Add a batch's gradients to the sums of their cut layers, in the order of the passes."""
        for cuts in dict.fromkeys(one.cuts for one in gradients):
            same = [one for one in gradients if one.cuts == cuts]
            total = _wide(same[0])
            for one in same[1:]:
                total = sums_of(total, _wide(one), [one.unit / same[0].unit] * len(total))
            if cuts not in sums:
                sums[cuts] = SlotGradient(None if cuts is None else self.covers(cuts))
            sums[cuts].add(
                micro_batch,
                total,
                num_tokens=sum(n for slot, n in sorted(tokens.items()) if cuts_of[slot] == cuts),
                loss_denominator=same[0].unit,
            )


def _wide(one: PassGradient) -> list[Tensor | None]:
    return [None if gradient is None else widened(gradient) for gradient in one.gradients]


def _order(cuts: CutLayers | None) -> tuple[int, int]:
    return (-1, -1) if cuts is None else (cuts.first, cuts.second)
