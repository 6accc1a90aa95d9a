"""One step of an asynchronous run: the round that dispatches enter when they have arrived."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import Arrival, RoundPlan, SlotReport
from flower_split.trunk.compute.gradients import Reduction, faults, outliers
from flower_split.trunk.engine.dispatches import Dispatches
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_state import Round

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class BufferRound(Round):
    """A round without participants: the coordinator names the arrivals that make its one step."""

    dispatches: Dispatches
    reduction: Reduction
    entered: tuple[SlotReport, ...] = ()  # of the arrivals that made the step

    def extend(self, plan: RoundPlan) -> bool:
        """Send out whom ``plan`` names beside those at work, if all else in it is the same."""
        same = replace(plan, dispatches=self.plan.dispatches) == self.plan
        if not same or self.report is not None:
            return False
        self.dispatches.follow(plan)
        self.plan = plan
        return True

    def finish(self, arrivals: Sequence[Arrival]) -> None:
        """Step with the arrivals. Only the compute thread calls it.

        Raises:
            TrunkRefused: There is none, or one is not done; nothing has changed.
        """
        if not arrivals:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, f"{self} cannot be prepared without an arrival."
            )
        taken, gradients, factors = self.dispatches.take(arrivals)
        bad = faults(gradients) or outliers(gradients, self.reduction.outlier_factor)
        if bad:  # their adapters are about to be aggregated, so nobody can be left out here alone
            named = "; ".join(f"slot {taken[index].slot}: {why}" for index, why in bad.items())
            self.windows.abort(named)
            return
        try:
            if gradients:
                self.compute.step(self.reduction(gradients, factors))
        except Exception as error:
            logger.exception("the optimizer step failed in %s", self)
            self.windows.abort(f"the trunk's optimizer step failed: {error}")
            return
        for dispatch in taken:
            self.ledger_hash ^= dispatch.ledger_hash
            self.compute_seconds += dispatch.compute_seconds
        self.entered = tuple(report for item in taken for report in item.slot_reports())
        self.windows.phase = Phase.DONE

    def forget_work(self) -> None:
        """Recall everybody at work: what they gathered began with weights that are no more."""
        self.dispatches.clear(self.windows.problem)

    def slot_reports(self) -> tuple[SlotReport, ...]:
        """Return what everybody at work has done so far."""
        return tuple(report for item in self.dispatches.all() for report in item.slot_reports())

    def final_reports(self) -> tuple[SlotReport, ...]:
        """Return what the arrivals did that entered the step."""
        return self.entered
