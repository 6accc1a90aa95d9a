"""What a round's open window has gathered, where every micro-batch is computed alone.

:class:`~flower_split.trunk.engine.batched_round.BatchedRound` answers the same questions for windows whose
micro-batches are computed together.
"""

from collections.abc import Sequence

from flower_split.protocol.values import BatchReport
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.compute.screening import faults, outliers


class OpenWindow:
    """The open window of a round, which sets what it works with. The engine's lock is held."""

    gradients: dict[int, SlotGradient]

    def window_gradients(self, slots: Sequence[int]) -> dict[int, SlotGradient]:
        """Return what ``slots`` gave to the open window, as a reduction takes it."""
        return {slot: self.gradients[slot] for slot in slots}

    def window_faults(self, slots: Sequence[int], *, whole_step: bool) -> dict[int, str]:
        """Return the slots whose gradients may not enter the step, each with the reason."""
        return faults(self.window_gradients(slots), whole_step=whole_step)

    def window_outliers(self, slots: Sequence[int], factor: float) -> dict[int, str]:
        """Return the slots whose gradients are far above the window's median, each with the reason."""
        return outliers(self.window_gradients(slots), factor)

    def window_tokens(self, slots: Sequence[int]) -> dict[int, float]:
        """Return the label tokens that each slot gave to the open window."""
        return {slot: self.gradients[slot].num_tokens for slot in slots}

    def trunk_norms(self, slots: Sequence[int]) -> dict[int, float]:
        """Return the norms of what the trunk computed for each slot that passes through all of it."""
        gradients = {slot: self.gradients[slot] for slot in slots}
        return {slot: g.mean_norm() for slot, g in gradients.items() if g.covers is None}

    def forget_window(self) -> None:
        """Forget what the open window has gathered: the trunk has stepped with it."""
        self.gradients.clear()

    def go_on(self) -> None:
        """Start what a change lets go on, or tell whoever waits that the round was given up."""

    def batch_report(self) -> BatchReport:
        """Return the figures of the joint batches so far."""
        return BatchReport()
