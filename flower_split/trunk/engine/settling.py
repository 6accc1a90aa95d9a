"""What follows from a change in a round beside a step: clients dropped or taken out, deadlines.

Only the compute thread calls these methods, but for :meth:`Settling.expire`. Each holds the engine's
lock while it decides.
"""

import logging

from flower_split.trunk.engine.contributions import WindowSteps
from flower_split.trunk.engine.round_state import Round

logger = logging.getLogger(__name__)


class Settling(WindowSteps):
    """Ends what somebody no longer waits for, and steps with what that completes."""

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
