"""One attempt of one server round on the trunk, and the questions that its kind answers.

Those that every call asks have a base class beside the index that finds the round:
:class:`~flower_split.trunk.engine.round_index.RoundCalls`.

Three kinds share one interface, so that whoever handles a call need not know which one it is of:
:class:`Round` here, where windows of all participants make the optimizer steps;
:class:`~flower_split.trunk.engine.buffer_round.BufferRound`, one step of an asynchronous run; and
:class:`~flower_split.trunk.engine.dispatches.DispatchRound`, one client at work in such a run.

The engine's lock (:class:`~flower_split.trunk.engine.round_index.RoundIndex`) guards every field and
is held around every method, but for the methods that say otherwise.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    Arrival,
    CallResult,
    FinishResult,
    RoundBase,
    RoundPlan,
    RoundReport,
)
from flower_split.split import CutLayers
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.compute.weights_state import Snapshot
from flower_split.trunk.engine.ledger import Ledger
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_index import RoundCalls, hashed
from flower_split.trunk.engine.round_reports import RoundReports
from flower_split.trunk.engine.sessions import Session, StepEnd
from flower_split.trunk.engine.shares import Usage
from flower_split.trunk.engine.window_batches import WindowBatches
from flower_split.trunk.engine.windows import WindowMachine


@dataclass(kw_only=True, slots=True, eq=False)
class Round(RoundCalls, RoundReports):
    """State of one attempt, from BeginRound until another round begins."""

    plan: RoundPlan
    compute: TrunkCompute
    trains: bool  # whether the trunk's weights train (mode joint)
    windows: WindowMachine
    before: Snapshot  # what an abort goes back to
    activations: ActivationCache  # what its calls keep between forward and backward
    slots_by_token: dict[bytes, int]  # SHA-256 of the session token -> slot
    ledger: Ledger[CallResult] = field(default_factory=Ledger)
    sessions: dict[str, Session] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)  # sessions whose client has left
    gradients: dict[int, SlotGradient] = field(default_factory=dict)  # of the open window, by slot
    batches: WindowBatches | None = None  # None: every micro-batch is computed alone
    step_ends: Ledger[FinishResult] = field(default_factory=Ledger)
    ending: dict[int, StepEnd] = field(default_factory=dict)  # of the open window, by slot
    usage: Usage = field(default_factory=Usage)
    # step-every contribution: slot, window and micro-batch of the forward that has no backward yet
    open_contribution: tuple[int, int, int] | None = None
    open_since: float = 0.0
    began: float = 0.0
    last_activity: float = 0.0
    last_seen: dict[int, float] = field(default_factory=dict)  # slot -> its latest call
    compute_seconds: float = 0.0
    # The contributions counted: their hashes, XORed, so that their order is no matter.
    ledger_hash: int = 0
    report: RoundReport | None = None  # set when it is prepared
    committed: bool = False
    rolled_back: bool = False
    retired: bool = False  # another round has taken its place, or its work has entered one

    @property
    def over(self) -> bool:
        """Whether nothing more can happen in it."""
        return self.committed or self.windows.phase is Phase.ABORTED

    def waited_for(self) -> list[int]:
        """Return the slots that all others wait for now."""
        return [] if self.plan.evaluate or self.over else self.windows.waited_for()

    def silent(self, now: float) -> list[int]:
        """Return the slots whose lease has ended: joined, not finished, and without a call.

        Where a window waits for all its participants, its own deadline does this.
        """
        per_step = self.windows.step_every is StepEvery.LOCAL_STEP
        if self.plan.evaluate or self.over or per_step:
            return []
        ended = now - self.plan.window_seconds
        return [
            slot
            for slot, seen in self.last_seen.items()
            if seen < ended
            and not self.windows.slots[slot].finished
            and not self.windows.slots[slot].dropped
            and not self.ledger.pending(slot)
        ]

    # ------------------------------------------------------------------ the coordinator

    def extend(self, plan: RoundPlan) -> bool:
        """Begin again with ``plan`` if it goes on with this round; return whether it does."""
        return False

    def is_base_of(self, plan: RoundPlan) -> bool:
        """Return whether this round is prepared, and ``plan`` says that it is committed."""
        return (
            self.report is not None
            and plan.base == RoundBase(self.plan.server_round, self.report.digest)
            and self.plan.experiment == plan.experiment
        )

    def finish(self, arrivals: Sequence[Arrival]) -> None:
        """Take no more contributions: drop who is not finished.

        Args:
            arrivals: The arrivals of an asynchronous round.
        """
        self.windows.finish()
        self.release_dropped()

    def drop(self, slot: int, why: str, now: float) -> None:
        """Go on without a client that has not finished, or abort, by the quorum."""
        self.windows.drop(slot, why, now)
        self.release_dropped()

    def release_dropped(self) -> None:
        """Forget what the dropped slots gave to the open window."""
        for slot, state in self.windows.slots.items():
            if state.dropped:
                self.forget_slot(slot)
                end = self.ending.pop(slot, None)
                if end is not None:
                    end.future.set_exception(
                        TrunkRefused(
                            RefusalReason.DROPPED,
                            f"the round goes on without slot {slot}: {state.dropped}.",
                        )
                    )
                if self.open_contribution is not None and self.open_contribution[0] == slot:
                    self.open_contribution = None

    def forget_slot(self, slot: int) -> None:
        """Forget what a slot that no longer takes part gave to the open window."""
        self.gradients.pop(slot, None)
        self.activations.release_slot(slot)

    def forget_work(self) -> None:
        """Free what an aborted round has gathered."""
        self.activations.clear()
        self.gradients.clear()
        self.ending.clear()  # whoever waits is told that the round was given up

    def go_on(self) -> None:
        """Start what a change lets go on, or tell whoever waits that the round was given up."""

    # ------------------------------------------------------------------ names and sessions

    def seat(self, slot: int, planned_steps: int, cuts: CutLayers | None) -> Session:
        """Return the session of a slot: a new one, or that of a client that comes back.

        Raises:
            TrunkRefused: It joined with other cut layers (INVALID_REQUEST).
        """
        session = next((s for s in self.sessions.values() if s.slot == slot), None)
        if session is None:
            session = Session(secrets.token_hex(16), slot, planned_steps, cuts)
            self.sessions[session.id] = session
        elif session.cuts != cuts:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot} joined with cut layers {session.cuts} and now says {cuts}; they "
                "cannot change within a round.",
            )
        self.closed.discard(session.id)
        return session

    def slot_of(self, token: str) -> int:
        """Return the slot whose session token this is.

        Raises:
            TrunkRefused: It is nobody's of this round (UNAUTHENTICATED).
        """
        slot = self.slots_by_token.get(hashed(token))
        if slot is None:
            raise TrunkRefused(
                RefusalReason.UNAUTHENTICATED,
                f"the session token does not belong to {self}. Tokens are handed out by the "
                "strategy, one per client and round; this client's message is of another round.",
            )
        return slot

    def __str__(self) -> str:
        plan = self.plan
        kind = "evaluation" if plan.evaluate else "round"
        return (
            f"{kind} {plan.server_round} (attempt {plan.attempt}) of experiment {plan.experiment}"
        )
