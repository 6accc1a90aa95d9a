"""A round whose clients' micro-batches are computed together (``trunk.window-batches``)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flower_split.errors import FlowerSplitError, RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.values import BatchReport, TrunkStatus
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.window_batches import Waiting, WindowBatches


@dataclass(kw_only=True, slots=True, eq=False)
class BatchedRound(Round):
    """A round that steps with every local step, and gathers its clients' calls into batches."""

    batches: WindowBatches

    def forget_slot(self, slot: int) -> None:
        """Forget a slot that no longer takes part, and tell its calls that wait.

        What it has given stays in the window's sum, which is taken again before the step.
        """
        self.activations.release_slot(slot)
        why = self.windows.slots[slot].dropped or "it has planned fewer steps"
        refusal = TrunkRefused(
            RefusalReason.DROPPED, f"the round goes on without slot {slot}: {why}."
        )
        self._turn_away(self.batches.remove(slot), refusal)

    def forget_work(self) -> None:
        """Free what an aborted round has gathered."""
        self.go_on()  # whoever waits is told first
        Round.forget_work(self)  # slots=True makes the class anew: super() would not find it
        self.batches.next_window()

    def go_on(self) -> None:
        """Start the batches that wait for nobody any more, or tell everybody that it is over."""
        if self.windows.phase is Phase.ABORTED:
            over = RoundAborted(f"{self} was given up: {self.windows.problem}")
            self._turn_away(self.batches.remove_all(), over)
        else:
            self.batches.start_ready(self.windows.present(), self.windows.num_planned)

    def batch_report(self) -> BatchReport:
        """Return the figures of the joint batches so far."""
        return self.batches.report()

    def described(self, base: TrunkStatus) -> TrunkStatus:
        """Return ``base`` with where this round stands."""
        return replace(Round.described(self, base), batches=self.batches.report())

    def _turn_away(self, calls: Sequence[Waiting], error: FlowerSplitError) -> None:
        for waiting in calls:
            self.ledger.forget(waiting.item.name)
            waiting.future.set_exception(error)
