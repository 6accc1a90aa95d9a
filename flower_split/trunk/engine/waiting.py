"""What calls wait for before they compute: the weights' version, or their turn. Always with an end."""

import threading
from collections.abc import Callable

from flower_split.errors import RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.dispatches import Flight
from flower_split.trunk.engine.ledger import CallName
from flower_split.trunk.engine.round_lifecycle import RoundKeeper
from flower_split.trunk.engine.round_state import Round


class WaitingRoom:
    """Calls that cannot run yet.

    Args:
        keeper: Of the open round.
        compute: The trunk module.
        changed: The engine's lock, notified at every change; held around every method, and released
            while one waits.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        keeper: RoundKeeper,
        compute: TrunkCompute,
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self._keeper = keeper
        self._compute = compute
        self._changed = changed
        self._clock = clock

    def until(
        self,
        current: Round,
        reached: Callable[[], bool],
        deadline: float,
        what: Callable[[], str],
    ) -> None:
        """Wait until ``reached``.

        Args:
            current: The call's round.
            reached: Asked after every change, and once a second.
            deadline: When to give up.
            what: What is waited for, in words.

        Raises:
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        while True:
            self._keeper.require_open(current)
            if reached():
                return
            left = deadline - self._clock()
            if left <= 0:
                raise TrunkUnavailable(f"the deadline passed while waiting for {what()}.")
            self._changed.wait(min(left, 1.0))

    def before_forward(self, current: Round, name: CallName, version: int, deadline: float) -> None:
        """Return when a training forward may run: at its version, or holding the turn.

        Raises:
            TrunkRefused: The weights have moved on (STALE_VERSION), or the slot is not in the window.
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        if current.ledger.knows(name):
            return
        current.windows.check_planned(name.slot, name.window)
        if not self._keeper.trains:
            return
        if isinstance(current, Flight):
            current.check_forward(version)
            return
        if current.windows.step_every is StepEvery.CONTRIBUTION:
            self._take_turn(current, name, deadline)
            return
        self.until(
            current,
            lambda: (
                self._compute.version >= version or bool(current.windows.slots[name.slot].dropped)
            ),
            deadline,
            lambda: f"version {version} of the trunk's weights; {current.windows.waiting_for()}",
        )
        current.windows.check(name.slot, name.window)
        if version != self._compute.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"slot {name.slot} asks for version {version} of the weights; they are at "
                f"{self._compute.version}.",
            )

    def _take_turn(self, current: Round, name: CallName, deadline: float) -> None:
        mine = (name.slot, name.window, name.micro_batch)

        def free() -> bool:
            self._keeper.touch(current, name.slot)  # who waits for its turn is not silent
            if current.turn not in (None, mine) and (
                self._clock() > current.turn_since + current.plan.window_seconds
            ):
                assert current.turn is not None
                self._keeper.activations.release(current.turn)
                current.turn = None
            return current.turn in (None, mine)

        self.until(current, free, deadline, lambda: "its turn (trunk.step-every contribution)")
        current.turn, current.turn_since = mine, self._clock()
