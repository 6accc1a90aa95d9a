"""The life of a server round on the trunk: begin, contributions, steps, prepare, commit, abort.

The methods under "on the compute thread" change weights, and only that thread calls them; the others
only look, with the lock held. So a call is checked, computed, recorded and (where it completes a
window) stepped as one transaction.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    ActivationReport,
    Arrival,
    RoundBase,
    RoundPlan,
    RoundReport,
    SlotReport,
)
from flower_split.runtime import failpoints
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.committed_weights import CommittedWeights
from flower_split.trunk.engine.dispatches import Flight, Flights
from flower_split.trunk.engine.round_state import Round, Session, hashed, slot_reports
from flower_split.trunk.engine.windows import Phase, WindowMachine

logger = logging.getLogger(__name__)


class RoundKeeper:
    """The open round of one trunk, and every transition of it.

    Args:
        compute: The trunk module and its optimizer.
        trains: Whether the trunk's weights train (mode joint).
        activations: What is kept between forward and backward.
        reduction: How the clients' gradients of a window become one.
        flights: Who is at work in asynchronous rounds.
        epoch: Of this process.
        changed: Guards the round; notified at every transition.
        checkpoints: Where rounds are kept before they are committed.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        compute: TrunkCompute,
        *,
        trains: bool,
        activations: ActivationCache,
        reduction: Reduction,
        flights: Flights,
        epoch: int,
        changed: threading.Condition,
        checkpoints: CheckpointStore | None,
        clock: Callable[[], float],
    ) -> None:
        self.compute = compute
        self.trains = trains
        self.activations = activations
        self.reduction = reduction
        self.flights = flights
        self.epoch = epoch
        self.changed = changed
        self.clock = clock
        self.round: Round | None = None
        self.weights = CommittedWeights(compute, checkpoints)

    # ------------------------------------------------------------------ looking, with the lock held

    def open_round(self) -> Round:
        """The round that is open for calls; refuses if there is none, raises if it was aborted."""
        current = self.round
        if current is None or current.committed:
            raise TrunkRefused(
                RefusalReason.NO_ROUND,
                "no round is open on the trunk: the coordinator has not begun one, or it is over.",
            )
        self.require_open(current)
        return current

    def require_open(self, current: Round) -> None:
        """Raise unless ``current`` is still the round of the trunk and was not given up."""
        if current.windows.phase is Phase.ABORTED:
            raise RoundAborted(f"{current} was given up: {current.windows.problem}")
        if current is not self.round and not self.flights.has(current):
            raise TrunkRefused(
                RefusalReason.WRONG_ATTEMPT, f"{current} is no longer the open round."
            )

    def named_round(self, experiment: str, server_round: int, attempt: int) -> Round:
        """The round that the coordinator names, if it is the last begun; otherwise refuse."""
        current = self.round
        if current is None or (
            current.plan.experiment,
            current.plan.server_round,
            current.plan.attempt,
        ) != (experiment, server_round, attempt):
            raise TrunkRefused(
                RefusalReason.WRONG_ATTEMPT,
                f"round {server_round} (attempt {attempt}) of experiment {experiment} is not the open "
                f"one; {current or 'none'} is.",
            )
        return current

    def member(self, session: str, epoch: int) -> tuple[Round, Session]:
        """The open round and the client that ``session`` belongs to; otherwise refuse."""
        if epoch != self.epoch:
            raise TrunkRefused(
                RefusalReason.WRONG_EPOCH,
                "the trunk process has restarted since this session opened; the round begins again.",
            )
        current = self.flights.by_session(session) or self.open_round()
        self.require_open(current)
        member = current.sessions.get(session)
        if member is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_SESSION, f"no such session in {current}; open one first."
            )
        self.touch(current, member.slot)
        return current, member

    def round_of_token(self, token: str) -> Round:
        """What a token opens a session of: its dispatch, or else the open round."""
        current = self.flights.by_token(hashed(token)) or self.open_round()
        self.require_open(current)
        return current

    def round_of_session(self, session: str) -> Round | None:
        """What a session belongs to, open or not; None: nothing that is still there."""
        current = self.flights.by_session(session) or self.round
        return current if current is not None and session in current.sessions else None

    def slot_reports(self, current: Round) -> tuple[SlotReport, ...]:
        """What every participant has done so far; in an asynchronous round, everybody at work."""
        if current.plan.step_every is not StepEvery.BUFFER:
            return slot_reports(current)
        return tuple(report for flight in self.flights.all() for report in slot_reports(flight))

    def touch(self, current: Round, slot: int) -> None:
        """Note a call of ``slot``, so that who is at work is told from who has gone."""
        current.last_activity = current.last_seen[slot] = self.clock()
        if isinstance(current, Flight) and self.round is not None:
            self.round.last_activity = current.last_activity

    def silent(self, current: Round) -> list[int]:
        """The slots whose lease has ended: they joined, have not finished, and say nothing.

        Where a window waits for all its participants, its own deadline does this.
        """
        plan = current.plan
        if plan.evaluate or current.over or current.windows.step_every is StepEvery.LOCAL_STEP:
            return []
        ended = self.clock() - plan.window_seconds
        return [
            slot
            for slot, seen in current.last_seen.items()
            if seen < ended
            and not current.windows.slots[slot].finished
            and not current.windows.slots[slot].dropped
            and not current.ledger.pending(slot)
        ]

    # ------------------------------------------------------------------ on the compute thread

    def activations_of(self, current: Round) -> ActivationCache:
        """What is kept between forward and backward of a round, or of a dispatch."""
        return self.flights.activations if isinstance(current, Flight) else self.activations

    def settle(self, current: Round) -> None:
        """Step with every complete window, or roll back an aborted round."""
        with self.changed:
            if current is not self.round:
                return
            try:
                while not current.over and self._step_if_complete(current):
                    pass
            except Exception as error:
                logger.exception("the optimizer step failed in %s", current)
                current.windows.abort(f"the trunk's optimizer step failed: {error}")
            if current.windows.phase is Phase.ABORTED and not current.rolled_back:
                current.rolled_back = True
                self.compute.restore(current.before)
                self.activations.clear()
                current.gradients.clear()
                if current.plan.step_every is StepEvery.BUFFER:
                    self.flights.clear(current.windows.problem)
                level = logging.INFO if current.plan.evaluate else logging.WARNING
                logger.log(level, "%s aborted: %s", current, current.windows.problem)
            self.changed.notify_all()

    def _step_if_complete(self, current: Round) -> bool:
        windows = current.windows
        if windows.step_every is StepEvery.CONTRIBUTION:
            slots = sorted(current.gradients)
        else:
            slots = windows.contributors() or []
        if not slots:
            return False
        if self.trains:
            gradients = {slot: current.gradients[slot] for slot in slots}
            self.compute.step(self.reduction(gradients))
        current.gradients.clear()
        if windows.step_every is not StepEvery.CONTRIBUTION:
            windows.seal(self.clock())
            self.activations.release_before(windows.window)
        logger.debug("%s: step %d with slots %s", current, self.compute.version - 1, slots)
        return True

    def drop(self, current: Round, slot: int, why: str) -> None:
        """A client is gone before it finished: go on without it, or abort, by the quorum."""
        with self.changed:
            if isinstance(current, Flight) and self.flights.has(current) and not current.over:
                self.flights.recall(current, why)
            if current is not self.round or current.over:
                return
            current.windows.drop(slot, why, self.clock())
            self._release_dropped(current)
        self.settle(current)

    def expire(self, current: Round) -> None:
        """A deadline of the open window, or a lease, may have ended: act on it."""
        with self.changed:
            self.flights.expire()
            if current is not self.round or current.over:
                return
            current.windows.expire(self.clock())
            for slot in self.silent(current):
                why = f"it was silent for {current.plan.window_seconds:g} s, so its lease ended"
                current.windows.drop(slot, why, self.clock())
            self._release_dropped(current)
        self.settle(current)

    def _release_dropped(self, current: Round) -> None:
        for slot, state in current.windows.slots.items():
            if state.dropped:
                current.gradients.pop(slot, None)
                self.activations.release_slot(slot)
                if current.turn is not None and current.turn[0] == slot:
                    current.turn = None

    def begin(self, plan: RoundPlan) -> tuple[int, int]:
        """See :meth:`TrunkEngine.begin_round`."""
        with self.changed:
            former = self.round
            if former is not None and not former.over:
                if former.plan == plan:
                    return self.epoch, former.before.version
                if _is_same_buffer(former, plan):
                    self.flights.follow(plan)
                    former.plan = plan
                    return self.epoch, self.compute.version
                if self._is_base(former, plan):
                    self._keep(former)
                else:
                    self._supersede(former, plan)
            if plan.experiment != self.weights.experiment:
                self.flights.clear(f"experiment {plan.experiment} begins")
                self.weights.begin_experiment(plan.experiment)
            if not self.weights.stands_at(plan.base):
                self.flights.clear("the trunk goes back to the last committed round")
            self.weights.stand_at(plan.base)
            total = plan.num_server_rounds
            if plan.step_every not in (StepEvery.SERVER_ROUND, StepEvery.BUFFER):
                total *= plan.steps_per_round
            if plan.step_every is StepEvery.CONTRIBUTION:
                total *= len(plan.participants)
            self.compute.plan(total)
            buffered = plan.step_every is StepEvery.BUFFER
            if buffered:
                self.flights.follow(plan)
            elif not plan.evaluate:
                self.flights.clear(f"round {plan.server_round} is not asynchronous")
            self.activations.begin(_num_shares(plan))
            now = self.clock()
            self.round = Round(
                plan=plan,
                windows=WindowMachine(
                    plan.participants,
                    step_every=(
                        plan.step_every if self.trains or buffered else StepEvery.CONTRIBUTION
                    ),
                    quorum=plan.quorum,
                    join_seconds=plan.join_seconds,
                    window_seconds=plan.window_seconds,
                    now=now,
                ),
                before=self.compute.snapshot(),
                slots_by_token={hashed(token): slot for slot, token in plan.participants.items()},
                last_activity=now,
            )
            if buffered:
                self.round.windows.phase = Phase.OPEN  # nobody joins it: dispatches do
            self.changed.notify_all()
            logger.info(
                "begin %s: slots %s, version %d",
                self.round,
                sorted(plan.participants) or [entry.slot for entry in plan.dispatches],
                self.compute.version,
            )
            return self.epoch, self.compute.version

    def _is_base(self, former: Round, plan: RoundPlan) -> bool:
        """Whether ``former`` is prepared, and the manifest says that it is committed."""
        return (
            former.report is not None
            and plan.base == RoundBase(former.plan.server_round, former.report.digest)
            and former.plan.experiment == plan.experiment
        )

    def _supersede(self, former: Round, plan: RoundPlan) -> None:
        """Give an unfinished round up for a new one, unless it is another experiment's at work."""
        idle = self.clock() - former.last_activity
        patience = max(former.plan.join_seconds, former.plan.window_seconds)
        if former.plan.experiment != plan.experiment and idle < patience:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"the trunk is at work on {former} (last call {idle:.0f} s ago) and serves one "
                f"experiment at a time. Wait for it to end, or for {patience:.0f} s without a call.",
            )
        former.windows.abort(
            f"it was superseded by round {plan.server_round} (attempt {plan.attempt})"
        )
        self.settle(former)

    def prepare(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """See :meth:`TrunkEngine.prepare_round`."""
        reports: tuple[SlotReport, ...] = ()
        with self.changed:
            current = self.named_round(experiment, server_round, attempt)
            if current.report is not None:
                return current.report
            self.require_open(current)
            if current.plan.step_every is StepEvery.BUFFER:
                reports = self._step_with(current, arrivals)
            else:
                current.windows.finish()
                self._release_dropped(current)
        self.settle(current)
        with self.changed:
            self.require_open(current)
            digest = self.compute.digest()
        failpoints.reach("trunk.prepare.before")
        self._save(current, digest)
        failpoints.reach("trunk.prepare.written")
        with self.changed:
            self.require_open(current)
            current.report = RoundReport(
                version=self.compute.version,
                digest=digest,
                slots=reports or slot_reports(current),
                optimizer_steps=self.compute.version - current.before.version,
                compute_seconds=current.compute_seconds,
                activations=self.activation_report(current),
            )
        failpoints.reach("trunk.prepare.answering")
        return current.report

    def _step_with(self, current: Round, arrivals: Sequence[Arrival]) -> tuple[SlotReport, ...]:
        """The one step of an asynchronous round; returns what its arrivals did.

        Raises:
            TrunkRefused: There is none, or one is not done; nothing has changed.
        """
        if not arrivals:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, f"{current} is to be prepared without an arrival."
            )
        taken, gradients, factors = self.flights.take(arrivals)
        try:
            if gradients:
                self.compute.step(self.reduction(gradients, factors))
        except Exception as error:
            logger.exception("the optimizer step failed in %s", current)
            current.windows.abort(f"the trunk's optimizer step failed: {error}")
            return ()
        for flight in taken:
            current.ledger_hash ^= flight.ledger_hash
            current.compute_seconds += flight.compute_seconds
        current.windows.phase = Phase.DONE
        return tuple(report for flight in taken for report in slot_reports(flight))

    def activation_report(self, current: Round) -> ActivationReport:
        """What is kept between forward and backward in this round."""
        buffered = current.plan.step_every is StepEvery.BUFFER
        return (self.flights.activations if buffered else self.activations).report()

    def _save(self, current: Round, digest: str) -> None:
        """Write the round's checkpoint, or give the round up."""
        try:
            self.weights.save(current, digest)
        except OSError as error:
            logger.error("%s: the checkpoint cannot be written: %s", current, error)
            with self.changed:
                current.windows.abort(
                    f"the trunk's checkpoint cannot be written to {self.weights.directory}: "
                    f"{error.strerror or error}. The checkpoints before it are intact; free space, "
                    "and resume"
                )
            self.settle(current)

    def commit(self, experiment: str, server_round: int, attempt: int) -> int:
        """See :meth:`TrunkEngine.commit_round`."""
        with self.changed:
            current = self.named_round(experiment, server_round, attempt)
            self.require_open(current)
            if current.report is None and not current.plan.evaluate:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"{current} must be prepared before it is committed.",
                )
            failpoints.reach("trunk.commit.before")
            self._keep(current)
            failpoints.reach("trunk.commit.after")
            return self.compute.version

    def _keep(self, current: Round) -> None:
        """What ``current`` did stays."""
        current.committed = True
        self.weights.keep(current)
        self.activations.clear()
        self.changed.notify_all()


def _is_same_buffer(former: Round, plan: RoundPlan) -> bool:
    """Whether ``plan`` says again which clients are at work in the asynchronous round ``former``."""
    return (
        former.plan.step_every is plan.step_every is StepEvery.BUFFER
        and replace(plan, dispatches=former.plan.dispatches) == former.plan
        and former.report is None
    )


def _num_shares(plan: RoundPlan) -> int:
    """Parts of the activation budget: one a client where all run at once, else half for one."""
    if plan.step_every is StepEvery.BUFFER:
        return 1  # who is at work has a budget of its own
    most = 2 if plan.step_every is StepEvery.SERVER_ROUND else len(plan.participants)
    return min(most, len(plan.participants))
