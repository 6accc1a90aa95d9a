"""How long the open round waits, and for whom; :class:`RoundIndex` in ``round_index.py`` has the state."""

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from flower_split.errors import TrunkUnavailable

if TYPE_CHECKING:  # round_index.py is one of these
    from flower_split.trunk.engine.dispatches import Dispatches
    from flower_split.trunk.engine.round_state import Round


class RoundWaits:
    """Deadlines of the open round, and waiting for a change. ``changed`` is held around every method."""

    changed: threading.Condition
    clock: Callable[[], float]
    dispatches: "Dispatches"
    round: "Round | None"
    _heard: float

    def hear_coordinator(self) -> None:
        """Note a word of the coordinator's."""
        self._heard = self.clock()

    @property
    def coordinator_deadline(self) -> float:
        """When the open round ends for want of its coordinator; a prepared one waits for ever."""
        current = self.round
        if current is None or current.over or current.report is not None:
            return math.inf
        seconds = current.plan.coordinator_seconds
        return self._heard + seconds if seconds > 0 else math.inf

    @property
    def deadline(self) -> float:
        """When something ends next in the open round; infinite where nothing is awaited."""
        current = self.round
        if current is None or current.over:
            return math.inf
        return min(current.windows.deadline, self.coordinator_deadline)

    def has_silent(self) -> bool:
        """Return whether the lease of a client at work has ended."""
        current = self.round
        return current is not None and bool(
            current.silent(self.clock()) or self.dispatches.silent()
        )

    def wait(
        self,
        current: "Round",
        reached: Callable[[float], bool],
        deadline: float,
        what: Callable[[], str],
    ) -> None:
        """Wait until ``reached``; the lock is free meanwhile.

        Args:
            current: The call's round.
            reached: Asked after every change, and once a second; given the time.
            deadline: When to give up.
            what: Says what is waited for.

        Raises:
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        while True:
            current.require_open()
            if reached(self.clock()):
                return
            self.pause(deadline, what)

    def pause(self, deadline: float, what: Callable[[], str]) -> None:
        """Wait for the next change, or a second; the lock is free meanwhile.

        Args:
            deadline: When to give up.
            what: Says what is waited for.

        Raises:
            TrunkUnavailable: The deadline has passed.
        """
        left = deadline - self.clock()
        if left <= 0:
            raise TrunkUnavailable(f"the deadline passed while waiting for {what()}.")
        self.changed.wait(min(left, 1.0))
