"""Clients at work in an asynchronous round, each with the weights it was sent out with.

John Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022
(arXiv 2106.06639), for the layers in the middle. Clients go out and come back at any time; a round is
the K that came back first, and makes one optimizer step. So between a client's forward and its backward
the trunk may have stepped several times. What that means here:

- A **dispatch** is one client sent to work. Its version is the trunk's at the moment the coordinator
  first names it (BeginRound), and is also the version of the client adapter that it was sent.
- All its forwards and backwards compute with that version's weights, kept as a copy
  (:mod:`flower_split.trunk.compute.weight_versions`): its gradient is that of an unsplit model of
  one version.
- Its gradient over all its local steps, ``Σ d g`` in fp32 with its tokens, stays with it until the
  coordinator names it among a round's arrivals (PrepareRound), each with a factor for its staleness.
  Then the trunk takes one step with ``Σ s n g / Σ n`` in the order of slot and dispatch: the same
  arrivals give the same bits, whatever the order in which they came.
- A dispatch counts once: it leaves with the round that it entered. One that the coordinator does not
  name any more is recalled: its calls are refused, and nothing of it is left.
- Commit and abort are those of any round. What is at work or has arrived, and is not committed, lives
  in memory only: a crash or an abort loses it, and the coordinator sends its clients out again.

Every dispatch is a round of one participant to the engine: its own ledger, window, cuts and gradient.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, Dispatch, RoundPlan
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import SlotGradient
from flower_split.trunk.compute.weight_versions import Versions, Weights
from flower_split.trunk.compute.weights_state import Snapshot
from flower_split.trunk.engine.ledger import CallName
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_index import hashed
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.windows import WindowMachine

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class DispatchRound(Round):
    """A client at work: a round of one participant, at its own version."""

    number: int
    copies: Weights | None  # None: nothing trains on the trunk, or its work is done
    on_arrival: Callable[[], None]  # frees copies that nobody needs any more

    @property
    def slot(self) -> int:
        """The client's slot."""
        return next(iter(self.plan.participants))

    @property
    def version(self) -> int:
        """The version of the weights that it was sent out with. Needs no lock."""
        return self.before.version

    @property
    def weights(self) -> Weights | None:
        """The copies that its calls compute with; None: the trunk's own weights."""
        return self.copies

    @property
    def arrived(self) -> bool:
        """Whether every planned contribution is in."""
        return self.windows.slots[self.slot].finished

    @property
    def problem(self) -> str:
        """Why its work is not done."""
        return self.windows.problem or self.windows.waiting_for()

    def may_forward(self, name: CallName, version: int, now: float) -> bool:
        """Return True: a dispatch never waits for others.

        Raises:
            TrunkRefused: It expects another version, or the client has given everything it planned.
        """
        if name in self.ledger.calls:
            return True
        self.windows.check_planned(name.slot, name.window)
        if not self.trains:
            return True
        if version != self.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"slot {self.slot} asks for version {version} of the weights; {self} was sent out "
                f"with {self.version}.",
            )
        if self.arrived:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {self.slot} sends a forward after the last micro-batch of {self}.",
            )
        return True

    def after_contribution(self) -> None:
        """Let go of the weights' copies once everything planned is given."""
        if self.arrived:
            self.copies = None
            self.on_arrival()

    def drop(self, slot: int, why: str, now: float) -> None:
        """End it: its calls are refused from now on, and its gradient is forgotten."""
        if not self.arrived:
            self.activations.release_slot(self.slot)
        self.windows.abort(why)
        self.gradients.clear()
        self.copies = None
        logger.info("%s is recalled: %s", self, why)

    def __str__(self) -> str:
        return f"dispatch {self.number} (slot {self.slot}) of experiment {self.plan.experiment}"


class Dispatches:
    """Everybody at work. The engine's lock is held around every method.

    Args:
        compute: The trunk module.
        trains: Whether the trunk's weights train.
        activations: What is kept between forward and backward, over all dispatches.
        weight_bytes: Budget of the copies of former weights.
        clock: Monotonic seconds.

    Attributes:
        at_work: Everybody at work or arrived, by number.
    """

    def __init__(
        self,
        compute: TrunkCompute,
        *,
        trains: bool,
        activations: ActivationCache,
        weight_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.activations = activations
        self.versions = Versions(weight_bytes)
        self._compute = compute
        self._trains = trains
        self._clock = clock
        self.at_work: dict[int, DispatchRound] = {}

    # ------------------------------------------------------------------ on any thread

    def all(self) -> list[DispatchRound]:
        """Return everybody at work or arrived, by slot and number."""
        return sorted(self.at_work.values(), key=lambda item: (item.slot, item.number))

    def silent(self) -> list[DispatchRound]:
        """Return who has begun, is not done, and made no call for the length of a lease."""
        now = self._clock()
        return [
            dispatch
            for dispatch in self.at_work.values()
            if dispatch.windows.phase is Phase.OPEN
            and not dispatch.arrived
            and dispatch.last_seen.get(dispatch.slot, now) < now - dispatch.plan.window_seconds
            and not dispatch.ledger.pending(dispatch.slot)
        ]

    # ------------------------------------------------------------------ on the compute thread

    def follow(self, plan: RoundPlan) -> None:
        """Have exactly the dispatches of ``plan`` at work: new ones begin, others are recalled.

        A dispatch is known again by its number and token: those of a coordinator that has died are
        recalled, even where the next one counts from the same number.

        Raises:
            TrunkRefused: A slot is at work already (nothing has changed then), or the copy of the
                weights does not fit.
        """
        known = {
            entry.number
            for entry in plan.dispatches
            if entry.number in self.at_work
            and hashed(entry.token) in self.at_work[entry.number].slots_by_token
        }
        new = [entry for entry in plan.dispatches if entry.number not in known]
        self._check([self.at_work[number] for number in known], new)
        for number in [number for number in self.at_work if number not in known]:
            gone = self.at_work.pop(number)
            gone.drop(gone.slot, "the coordinator has recalled it", self._clock())
        if not self.at_work:
            self.activations.begin(max(1, len(new)))
        self._forget_versions()
        weights = (
            self.versions.copy_of(self._compute.version, self._compute.parameters)
            if new and self._trains and self._compute.parameters
            else None
        )
        for entry in new:
            self.activations.release_slot(entry.slot)  # forwards that its last dispatch left behind
            self.at_work[entry.number] = self._begun(plan, entry, weights)

    def _check(self, known: Sequence[DispatchRound], new: Sequence[Dispatch]) -> None:
        busy = [dispatch.slot for dispatch in known if self._trains and not dispatch.arrived]
        slots = busy + [entry.slot for entry in new]
        if len(set(slots)) < len(slots):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"a slot cannot be sent to work twice at a time; at work are {sorted(slots)}.",
            )

    def _begun(self, plan: RoundPlan, entry: Dispatch, weights: Weights | None) -> DispatchRound:
        now = self._clock()
        own = RoundPlan(
            experiment=plan.experiment,
            server_round=plan.server_round,
            attempt=entry.number,
            participants={entry.slot: entry.token},
            step_every=StepEvery.SERVER_ROUND,
            num_server_rounds=plan.num_server_rounds,
            join_seconds=plan.join_seconds,
            window_seconds=plan.window_seconds,
        )
        return DispatchRound(
            plan=own,
            compute=self._compute,
            trains=self._trains,
            activations=self.activations,
            windows=WindowMachine(
                [entry.slot],
                step_every=StepEvery.SERVER_ROUND if self._trains else StepEvery.CONTRIBUTION,
                quorum=1.0,
                join_seconds=plan.join_seconds,
                window_seconds=plan.window_seconds,
                now=now,
            ),
            before=Snapshot(self._compute.version, [], {}),
            slots_by_token={hashed(entry.token): entry.slot},
            last_activity=now,
            number=entry.number,
            copies=weights,
            on_arrival=self._forget_versions,
        )

    def take(
        self, arrivals: Sequence[Arrival]
    ) -> tuple[list[DispatchRound], dict[int, SlotGradient], dict[int, float]]:
        """Take the arrivals of a round out: their work enters its step, and they are gone.

        Returns:
            ``(dispatches, gradients, factors)``: the dispatches by slot and number, and by their index in
            that list the gradients (none where nothing trains) and the factors.

        Raises:
            TrunkRefused: One is not at work, or has not given everything it planned
                (UNKNOWN_CONTRIBUTION); all stay.
        """
        factors = {arrival.dispatch: arrival.factor for arrival in arrivals}
        for number in factors:
            dispatch = self.at_work.get(number)
            if dispatch is None or dispatch.over or (self._trains and not dispatch.arrived):
                why = "is not at work" if dispatch is None else f"is not done: {dispatch.problem}"
                raise TrunkRefused(
                    RefusalReason.UNKNOWN_CONTRIBUTION,
                    f"the coordinator says that dispatch {number} has arrived, but it {why}. It must "
                    "be sent out again.",
                )
        taken = [dispatch for dispatch in self.all() if dispatch.number in factors]
        gradients = {
            index: dispatch.gradients[dispatch.slot]
            for index, dispatch in enumerate(taken)
            if self._trains
        }
        for dispatch in taken:
            del self.at_work[dispatch.number]
            dispatch.retired = True  # its calls are refused from now on
        self._forget_versions()
        return taken, gradients, {i: factors[dispatch.number] for i, dispatch in enumerate(taken)}

    def expire(self) -> None:
        """Recall whoever's lease has ended; it stays named until the coordinator drops it."""
        for dispatch in self.silent():
            lease = f"{dispatch.plan.window_seconds:g}"
            why = f"it was silent for {lease} s, so its lease ended"
            dispatch.drop(dispatch.slot, why, self._clock())

    def clear(self, why: str) -> None:
        """Recall everybody: their round is given up, or another experiment begins."""
        for dispatch in self.at_work.values():
            dispatch.drop(dispatch.slot, why, self._clock())
        self.at_work.clear()
        self.activations.clear()
        self.versions.keep_only(set())

    def _forget_versions(self) -> None:
        self.versions.keep_only(
            {d.copies.version for d in self.at_work.values() if d.copies is not None}
        )
