"""Which contributions make which optimizer step of the trunk: the window machine.

A **window** is the set of contributions of one trunk optimizer step. Who belongs to it is known
before it opens (participants are named by the coordinator and declare their planned steps when they
join), so neither a gradient nor a decision depends on the order of arrival::

    JOINING ──all joined, or deadline with quorum──▶ OPEN(w) ──complete, or deadline with quorum──▶
    (the engine reduces and steps) ──seal──▶ OPEN(w + 1) ── … ──▶ DONE
    JOINING or OPEN ──deadline without quorum──▶ ABORTED

The machine holds no tensors, threads or clock: the engine passes times in seconds of one monotonic
clock, and holds one lock around every call.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.shorter_plans import shorten
from flower_split.trunk.engine.window_rules import WindowRule, why_given_up
from flower_split.trunk.engine.window_waits import WindowWaits


@dataclass(slots=True)
class Slot:
    """One participant of the round, and what it has given to the window that is open."""

    planned_steps: int | None = None  # None: has not joined
    dropped: str = ""  # why it no longer takes part
    received: set[int] = field(default_factory=set)  # micro-batch indices in the open window
    last: int | None = None  # index of its last micro-batch in the open window, once known
    contributions: int = 0  # over the round
    num_tokens: float = 0.0  # over the round
    steps_done: int = 0  # windows that have everything from it; 1 where a window is a round
    finished: bool = False  # every planned contribution is in
    must_end_step: bool = False  # a window also needs the end of the slot's step
    step_ended: bool = False  # in the open window

    @property
    def has_all_micro_batches(self) -> bool:
        """Whether the open window has every backward of this slot."""
        return self.last is not None and len(self.received) == self.last + 1

    @property
    def complete(self) -> bool:
        """Whether the open window has everything from this slot."""
        return self.has_all_micro_batches and (self.step_ended or not self.must_end_step)

    def clear(self) -> None:
        """Forget what the open window has from this slot."""
        self.received, self.last, self.step_ended = set(), None, False


class WindowMachine(WindowWaits):
    """The windows of one server round.

    Args:
        slots: The participants.
        step_every: What makes a step.
        quorum: Share of a window's members, in (0, 1], without which a deadline aborts the round.
        join_seconds: From ``now`` until every participant has joined.
        window_seconds: From a window's opening until it is complete.
        now: The time on the engine's monotonic clock.
        must_end_steps: Whether a slot is complete only when it has said that its step ends.
        rule: Asked, beside the quorum, before a window goes on without somebody; None: the quorum
            alone decides.
        late: Given who takes part in the open window, whom the others wait for; empty: nobody before
            its last call; None: nobody, for the trunk is at it. Where it is set, a deadline drops those
            alone, and the others get as long again. None: everybody is late who is not complete.

    ``SERVER_ROUND`` and ``CONTRIBUTION`` keep no deadlines of their own: their participants may
    run one after the other, and the coordinator ends the round (:meth:`finish`).
    """

    def __init__(
        self,
        slots: Iterable[int],
        *,
        step_every: StepEvery,
        quorum: float,
        join_seconds: float,
        window_seconds: float,
        now: float,
        must_end_steps: bool = False,
        rule: WindowRule | None = None,
        late: Callable[[Collection[int]], Collection[int] | None] | None = None,
    ) -> None:
        self.slots = {slot: Slot(must_end_step=must_end_steps) for slot in sorted(slots)}
        self.step_every = step_every
        self.quorum = quorum
        self.window_seconds = window_seconds
        self.window = 0
        self.phase = Phase.JOINING
        self.problem = ""
        self._rule = rule
        self._find_late = late
        self._deadline = now + join_seconds if step_every is StepEvery.LOCAL_STEP else math.inf

    @property
    def deadline(self) -> float:
        """When :meth:`expire` must be called next; infinite where nothing is awaited."""
        return self._deadline if self.phase in (Phase.JOINING, Phase.OPEN) else math.inf

    def join(self, slot: int, planned_steps: int, now: float) -> None:
        """Note how many optimizer steps a participant says it will take. Idempotent.

        Raises:
            TrunkRefused: It was dropped, plans no step, or changes its plan.
        """
        state = self._alive(slot)
        if planned_steps < 1:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"a client must plan at least 1 optimizer step to train; slot {slot} plans "
                f"{planned_steps}. Give it more data, or leave it out of the round.",
            )
        if state.planned_steps not in (None, planned_steps):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot} joined with {state.planned_steps} planned steps and now says "
                f"{planned_steps}; a plan cannot change within a round.",
            )
        state.planned_steps = planned_steps
        if self.phase is Phase.JOINING and not self.missing_joins():
            self._open(now)

    def shorten(self, slot: int, planned_steps: int) -> None:
        """Let a participant take fewer steps than it has planned.

        Raises:
            TrunkRefused: It was dropped, plans more than before, or fewer than are done.
        """
        state = self._alive(slot)
        shorten(state, slot, planned_steps, self.step_every is StepEvery.SERVER_ROUND)
        if self.phase is Phase.OPEN and not self.members():
            self.phase = Phase.DONE

    def check_planned(self, slot: int, window: int) -> None:
        """Check that ``slot`` takes part and planned ``window``, be it open or yet to come.

        Raises:
            TrunkRefused: The slot was dropped, or the window is not in its plan.
        """
        state = self._alive(slot)
        planned = state.planned_steps or 0
        if self.step_every is StepEvery.SERVER_ROUND:
            planned = 1
        if window >= planned:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot} planned {planned} windows and contributes to window {window}.",
            )

    def check(self, slot: int, window: int) -> None:
        """Check that ``slot`` may contribute to ``window`` now.

        Raises:
            TrunkRefused: As :meth:`check_planned`, or the window is not the open one.
        """
        self.check_planned(slot, window)
        if self.step_every is not StepEvery.CONTRIBUTION and window != self.window:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"window {window} is not open; window {self.window} is. The contribution of slot "
                f"{slot} was computed for other trunk weights; run the forward again.",
            )

    def contribute(
        self, slot: int, window: int, micro_batch: int, *, num_tokens: float, last: bool
    ) -> None:
        """Record one accepted contribution. The ledger has made sure that it is the first.

        Raises:
            TrunkRefused: As :meth:`check`, or a micro-batch after the last.
        """
        self.check(slot, window)
        state = self.slots[slot]
        end = micro_batch if last else state.last
        if end is not None and max(state.received | {micro_batch}) > end:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot} sends micro-batch {micro_batch} beside its last one, {end}, in "
                f"window {window}.",
            )
        state.received.add(micro_batch)
        state.last = end
        state.contributions += 1
        state.num_tokens += num_tokens
        self._note_complete(state, window)
        if state.complete and self.step_every is StepEvery.CONTRIBUTION:
            state.clear()

    def end_step(self, slot: int, window: int, num_micro_batches: int) -> None:
        """Record that a slot's step ends. The ledger has made sure that it is the first time.

        Args:
            slot: Whose.
            window: The open one.
            num_micro_batches: How many the slot says that it has sent.

        Raises:
            TrunkRefused: As :meth:`check`, or a backward is missing.
        """
        self.check(slot, window)
        state = self.slots[slot]
        if not state.has_all_micro_batches or len(state.received) != num_micro_batches:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot} ends its step of {num_micro_batches} micro-batches in window {window}; "
                f"the trunk has counted {len(state.received)} of "
                f"{'an open number' if state.last is None else state.last + 1}. FinishStep follows "
                "the reply to the last backward.",
            )
        state.step_ended = True
        self._note_complete(state, window)

    def drop(self, slot: int, why: str, now: float) -> None:
        """Let a participant leave before it has given everything it planned."""
        state = self.slots[slot]
        if not state.finished and not state.dropped:
            state.dropped = why
            state.clear()
            self._check_quorum()
            if self.phase is Phase.JOINING and not self.missing_joins():
                self._open(now)

    def exclude(self, slot: int, why: str) -> None:
        """Take a participant out whose contribution may not count, be it finished or not."""
        state = self.slots[slot]
        state.dropped, state.finished = why, False
        state.received, state.last = set(), None
        self._check_quorum()

    def due(self, given: Collection[int]) -> list[int]:
        """Return the slots that make a step now, in their order; none: it must wait for more.

        Args:
            given: Slots whose gradients are there; where every contribution is a step, they are due.
        """
        if self.step_every is StepEvery.CONTRIBUTION:
            return [] if self.phase is Phase.ABORTED else sorted(given)
        if self.phase is not Phase.OPEN:
            return []
        members = [(slot, state) for slot, state in self.members() if not state.dropped]
        return [slot for slot, _ in members] if all(s.complete for _, s in members) else []

    def seal(self, now: float) -> None:
        """Open the next window, or be done: the engine has stepped with the open one."""
        self.window += 1
        for state in self.slots.values():
            state.clear()
        self._open(now)

    def expire(self, now: float) -> None:
        """Go on after a deadline without the missing, if the quorum allows, or abort."""
        if now < self.deadline:
            return
        if self.phase is Phase.JOINING:
            for slot in self.missing_joins():
                self.slots[slot].dropped = "it did not join within the join deadline"
        else:
            for slot in self.late():
                self.slots[slot].dropped = (
                    f"it did not contribute to window {self.window} within "
                    f"{self.window_seconds:g} s"
                )
            if self._find_late is not None:
                self._deadline = now + self.window_seconds
        self._check_quorum()
        if self.phase is Phase.JOINING:
            self._open(now)

    def finish(self) -> None:
        """Drop whoever is not finished: the coordinator says that nothing more will come."""
        for state in self.slots.values():
            if not state.finished and not state.dropped:
                state.dropped = (
                    "it never joined" if state.planned_steps is None else "it stopped early"
                )
                state.clear()
        self._check_quorum()
        if self.phase is Phase.JOINING:
            self.phase = Phase.OPEN

    def abort(self, why: str) -> None:
        """Give the round up; the first reason is kept."""
        if self.phase is not Phase.ABORTED:
            self.phase, self.problem = Phase.ABORTED, why

    def _note_complete(self, state: Slot, window: int) -> None:
        if state.complete:
            state.steps_done = window + 1
            whole_round = self.step_every is StepEvery.SERVER_ROUND
            state.finished = whole_round or state.steps_done == state.planned_steps

    def _alive(self, slot: int) -> Slot:
        state = self.slots[slot]
        if state.dropped:
            raise TrunkRefused(
                RefusalReason.DROPPED,
                f"the round goes on without slot {slot}: {state.dropped}. It may join the next "
                "round.",
            )
        return state

    def members(self) -> list[tuple[int, Slot]]:
        """Return who belongs to the open window, dropped ones included."""
        if self.step_every is StepEvery.SERVER_ROUND:
            return list(self.slots.items()) if self.window == 0 else []
        return [
            (slot, state)
            for slot, state in self.slots.items()
            if state.planned_steps is None or state.planned_steps > self.window
        ]

    def _open(self, now: float) -> None:
        done = all(state.dropped or state.finished for state in self.slots.values())
        self.phase = Phase.DONE if done else Phase.OPEN
        if self.step_every is StepEvery.LOCAL_STEP:
            self._deadline = now + self.window_seconds

    def _check_quorum(self) -> None:
        why = why_given_up(self.window, self.members(), self.quorum, self._rule)
        if why or all(state.dropped for state in self.slots.values()):
            self.abort(why or "every participant has left the round")
