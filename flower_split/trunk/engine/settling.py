"""What follows from a change in a round: optimizer steps, clients dropped, deadlines, roll-back.

Only the compute thread calls these methods, but for :meth:`Settling.expire`. Each holds the engine's
lock while it decides and while it steps, so that nobody sees a window that is complete and not yet stepped.
"""

import logging
from collections.abc import Mapping, Sequence

from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction, faults, outliers
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.step_ends import step_end_faults, step_together

logger = logging.getLogger(__name__)


class Settling:
    """Steps with complete windows and rolls back aborted rounds.

    Args:
        index: Finds the open round; holds the engine's lock.
        compute: The trunk module and its optimizer.
        reduction: How the clients' gradients of a window become one.
    """

    def __init__(self, index: RoundIndex, compute: TrunkCompute, reduction: Reduction) -> None:
        self._index = index
        self._compute = compute
        self._reduction = reduction

    def settle(self, current: Round) -> None:
        """Step with every complete window, or roll back an aborted round."""
        with self._index.changed:
            if current is not self._index.round:
                return
            try:
                while slots := current.windows.due(current.gradients):
                    self._step(current, slots)
            except Exception as error:
                logger.exception("the optimizer step failed in %s", current)
                current.windows.abort(f"the trunk's optimizer step failed: {error}")
            if current.windows.phase is Phase.ABORTED and not current.rolled_back:
                current.rolled_back = True
                self._index.totals.rounds_aborted += not current.plan.evaluate
                self._compute.restore(current.before)
                current.forget_work()
                level = logging.INFO if current.plan.evaluate else logging.WARNING
                logger.log(level, "%s aborted: %s", current, current.windows.problem)
            if current.batches is not None:
                current.go_on()
            self._index.changed.notify_all()

    def drop(self, current: Round, slot: int, why: str) -> None:
        """Go on without a client that left before it finished, or abort, by the quorum."""
        with self._index.changed:
            if current.retired or current.over:
                return
            current.drop(slot, why, self._index.clock())
        self.settle(current)

    def take_out(self, current: Round, slot: int, why: str) -> None:
        """Go on without a client whom an operator revoked, or give the round up, as for a bad one."""
        with self._index.changed:
            if current.retired or current.over or current.report is not None:
                return  # what is prepared stays: the coordinator has it in its manifest
            if not self._reduction.exclude_bad:
                self._blame(current, {slot: why})
            elif current.windows.slots[slot].finished:
                current.windows.exclude(slot, why)
                current.release_dropped()
            else:
                current.drop(slot, why, self._index.clock())
        self.settle(current)

    def shorten(self, current: Round, slot: int, planned_steps: int) -> None:
        """Let a client plan fewer steps, and step with what that completes.

        Raises:
            TrunkRefused: See :meth:`flower_split.trunk.engine.windows.WindowMachine.shorten`.
            RoundAborted: The round was given up.
        """
        with self._index.changed:
            current.require_open()
            state = current.windows.slots[slot]
            former = state.planned_steps
            current.windows.shorten(slot, planned_steps)
            if state.finished and not state.complete:  # of a step that it does not finish
                current.forget_slot(slot)
            current.after_contribution()
        if planned_steps != former:
            logger.info(
                "%s: slot %d takes %d of its %s planned steps", current, slot, planned_steps, former
            )
        self.settle(current)

    def expire(self) -> Round | None:
        """End deadlines and leases; return the round, which is then to be settled.

        Any thread may call it: whoever waits is told at once, whatever the compute thread does.
        """
        with self._index.changed:
            now = self._index.clock()
            self._index.dispatches.expire()
            current = self._index.round
            if current is None or current.over:
                return current
            current.windows.expire(now)
            if now >= self._index.coordinator_deadline:
                current.windows.abort(
                    f"its coordinator has said nothing for {current.plan.coordinator_seconds:g} s: the "
                    "ServerApp has ended, or does not reach the trunk. Resume the run"
                )
            for slot in current.silent(now):
                why = f"it was silent for {current.plan.window_seconds:g} s, so its lease ended"
                current.windows.drop(slot, why, now)
            current.release_dropped()
            current.go_on()
            self._index.changed.notify_all()
            return current

    def _step(self, current: Round, slots: Sequence[int]) -> None:
        """Step with what ``slots`` gave; or take out who is at fault, and look again."""
        windows = current.windows
        alone = windows.step_every is StepEvery.CONTRIBUTION
        if current.trains:
            rule = current.plan.finish
            total = None if current.batches is None else current.batches.total
            each = {} if total is not None else {slot: current.gradients[slot] for slot in slots}
            bad = total.faults(slots) if total else faults(each, whole_step=not alone)
            if rule is not None and not bad:
                bad = step_end_faults(current, slots)
            factor = self._reduction.outlier_factor
            bad = bad or (total.outliers(slots, factor) if total else outliers(each, factor))
            if bad:
                self._blame(current, bad)
                return
            reduced = self._reduction(total.gradients(slots) if total else each)
            if rule is None:
                self._compute.step(reduced)
            else:
                step_together(current, slots, reduced, rule, self._compute, self._index.clock)
        current.gradients.clear()
        if current.batches is not None:
            current.batches.next_window()
        if not alone:
            current.activations.release_before(windows.window + 1)
            windows.seal(self._index.clock())
        logger.debug("%s: step %d with slots %s", current, self._compute.version - 1, slots)

    def _blame(self, current: Round, bad: Mapping[int, str]) -> None:
        """Go on without the slots whose gradients may not enter the step, or give the round up."""
        for slot, why in bad.items():
            logger.warning("%s: slot %d is at fault: %s", current, slot, why)
        if not self._reduction.exclude_bad:
            named = "; ".join(f"slot {slot}: {why}" for slot, why in bad.items())
            current.windows.abort(
                f'{named}. trunk.on-bad-client = "abort" gives the round up for it; "exclude" goes on '
                "without the client where trunk.quorum allows."
            )
            return
        for slot, why in bad.items():
            current.windows.exclude(slot, why)
        current.release_dropped()
