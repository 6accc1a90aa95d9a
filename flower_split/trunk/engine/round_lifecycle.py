"""The life of a server round on the trunk, as the coordinator leads it: begin, prepare, commit, abort.

Only the compute thread calls these methods, so that none of them meets a call half done. They hold
the engine's lock, but while a checkpoint is written.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, RoundPlan, RoundReport
from flower_split.runtime import failpoints
from flower_split.runtime.log_fields import PROCESS_FIELDS
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.engine.batched_round import BatchedRound
from flower_split.trunk.engine.buffer_round import BufferRound
from flower_split.trunk.engine.committed_weights import CommittedWeights
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.revocations import Revocations
from flower_split.trunk.engine.round_index import RoundIndex, hashed
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.settling import Settling
from flower_split.trunk.engine.window_batches import WindowBatches
from flower_split.trunk.engine.window_rules import WindowRule
from flower_split.trunk.engine.windows import WindowMachine

logger = logging.getLogger(__name__)


class RoundLifecycle:
    """Leads one round after the other.

    Args:
        index: Finds the open round; holds the engine's lock.
        settling: Steps and rolls back.
        compute: The trunk module and its optimizer.
        weights: Where the trunk stands between rounds.
        activations: What the calls of ordinary rounds keep between forward and backward.
        reduction: How the arrivals of an asynchronous round become one gradient.
        trains: Whether the trunk's weights train (mode joint).
        window_rule: Whether a window of training goes on without somebody.
        make_batches: Makes what gathers the calls of a round into joint batches, where it steps with
            every local step; None: every micro-batch is computed alone.

    Attributes:
        revocations: The clients that an operator took out.
    """

    def __init__(
        self,
        index: RoundIndex,
        settling: Settling,
        compute: TrunkCompute,
        *,
        weights: CommittedWeights,
        activations: ActivationCache,
        reduction: Reduction,
        trains: bool,
        window_rule: WindowRule,
        make_batches: Callable[[], WindowBatches] | None = None,
    ) -> None:
        self.revocations = Revocations(index, settling)
        self._index = index
        self._settling = settling
        self._compute = compute
        self._weights = weights
        self._activations = activations
        self._reduction = reduction
        self._trains = trains
        self._window_rule = window_rule
        self._make_batches = make_batches

    def begin(self, plan: RoundPlan) -> tuple[int, int]:
        """Open a round; see :meth:`TrunkEngine.begin_round`."""
        if plan.finish is not None and not (
            self._trains and plan.step_every is StepEvery.LOCAL_STEP
        ):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "steps end together only where the trunk trains and steps with every local step.",
            )
        with self._index.changed:
            self._index.hear_coordinator()
            former = self._index.round
            if former is not None and former.committed and former.plan == plan:
                return self._index.epoch, former.before.version  # late: the round is over
            if former is not None and former.windows.phase is Phase.ABORTED:
                self._settling.settle(former)  # its deadline may have ended a moment ago
            if former is not None and not former.over:
                if former.plan == plan:  # a retry
                    return self._index.epoch, former.before.version
                if former.extend(plan):
                    return self._index.epoch, self._compute.version
                if former.is_base_of(plan):  # the manifest says so; CommitRound was lost
                    self._keep(former)
                else:
                    self._supersede(former, plan)
            self._stand_at_base(plan)
            self._compute.plan(_total_steps(plan))
            current = self._begun(plan)
            self._index.replace(current)
            if self._compute.share is not None:  # the process is at work on others, too
                self._compute.share.name = plan.experiment
            else:
                PROCESS_FIELDS.bind(
                    experiment=plan.experiment, round=plan.server_round, attempt=plan.attempt
                )
            logger.info(
                "begin %s: slots %s, version %d",
                current,
                sorted(plan.participants) or [entry.slot for entry in plan.dispatches],
                self._compute.version,
            )
            return self._index.epoch, self._compute.version

    def prepare(
        self, experiment: str, server_round: int, attempt: int, arrivals: Sequence[Arrival]
    ) -> RoundReport:
        """Finish a round and report; see :meth:`TrunkEngine.prepare_round`."""
        with self._index.changed:
            current = self._index.named_round(experiment, server_round, attempt)
            if current.report is not None:
                return current.report
            current.require_open()
            current.finish(arrivals)
        self._settling.settle(current)
        with self._index.changed:
            current.require_open()
            try:
                self._compute.check_state()
            except TrunkRefused as error:
                current.windows.abort(str(error))
        self._settling.settle(current)
        with self._index.changed:
            current.require_open()
            digest = self._compute.digest()
        failpoints.reach("trunk.prepare.before")
        self._save(current, digest)
        failpoints.reach("trunk.prepare.written")
        with self._index.changed:
            current.require_open()
            current.report = RoundReport(
                version=self._compute.version,
                digest=digest,
                slots=current.final_reports(),
                optimizer_steps=self._compute.version - current.before.version,
                compute_seconds=current.compute_seconds,
                activations=current.activations.report(),
                batches=current.batch_report(),
            )
        failpoints.reach("trunk.prepare.answering")
        return current.report

    def commit(self, experiment: str, server_round: int, attempt: int) -> int:
        """Keep what a round did; see :meth:`TrunkEngine.commit_round`."""
        with self._index.changed:
            current = self._index.named_round(experiment, server_round, attempt)
            current.require_open()
            if current.report is None and not current.plan.evaluate:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"{current} must be prepared before it is committed.",
                )
            failpoints.reach("trunk.commit.before")
            self._keep(current)
            failpoints.reach("trunk.commit.after")
            return self._compute.version

    def abort(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Give a round up; see :meth:`TrunkEngine.abort_round`."""
        with self._index.changed:
            current = self._index.named_round(experiment, server_round, attempt)
            if not current.committed:
                current.windows.abort(why)
        self._settling.settle(current)
        return self._compute.version

    def _stand_at_base(self, plan: RoundPlan) -> None:
        """Have the weights that ``plan`` begins with; whoever works on others is recalled."""
        dispatches = self._index.dispatches
        if plan.experiment != self._weights.experiment:
            dispatches.clear(f"experiment {plan.experiment} begins")
            self._weights.begin_experiment(plan.experiment)
        if not self._weights.stands_at(plan.base):
            dispatches.clear("the trunk goes back to the last committed round")
        self._weights.stand_at(plan.base)

    def _begun(self, plan: RoundPlan) -> Round:
        """Return a new round of the kind that ``plan`` asks for."""
        dispatches = self._index.dispatches
        if plan.asynchronous:
            dispatches.follow(plan)
        elif not plan.evaluate:  # an evaluation lets who is at work go on
            dispatches.clear(f"round {plan.server_round} is not asynchronous")
        self._activations.begin(_num_shares(plan))
        batches = self._batches_of(plan)
        windows = self._windows_of(plan, batches)
        if plan.asynchronous:
            windows.phase = Phase.OPEN  # nobody joins it: dispatches do
            return BufferRound(
                plan=plan,
                compute=self._compute,
                trains=self._trains,
                windows=windows,
                before=self._compute.snapshot(),
                activations=dispatches.activations,
                slots_by_token={},
                began=self._index.clock(),
                last_activity=self._index.clock(),
                dispatches=dispatches,
                reduction=self._reduction,
            )
        made = Round if batches is None else partial(BatchedRound, batches=batches)
        return made(
            plan=plan,
            compute=self._compute,
            trains=self._trains,
            windows=windows,
            before=self._compute.snapshot(),
            activations=self._activations,
            slots_by_token={hashed(token): slot for slot, token in plan.participants.items()},
            began=self._index.clock(),
            last_activity=self._index.clock(),
        )

    def _batches_of(self, plan: RoundPlan) -> WindowBatches | None:
        """Return what gathers a round's calls; None: each of them is computed alone."""
        if self._make_batches is None or plan.evaluate:
            return None
        if self._trains and plan.step_every is StepEvery.LOCAL_STEP:
            return self._make_batches()
        logger.info(
            "round %d: every micro-batch is computed alone, because the round does not step with every "
            "local step (trunk.window-batches)",
            plan.server_round,
        )
        return None

    def _windows_of(self, plan: RoundPlan, batches: WindowBatches | None) -> WindowMachine:
        return WindowMachine(
            plan.participants,
            step_every=(
                plan.step_every if self._trains or plan.asynchronous else StepEvery.CONTRIBUTION
            ),
            quorum=plan.quorum,
            join_seconds=plan.join_seconds,
            window_seconds=plan.window_seconds,
            now=self._index.clock(),
            must_end_steps=plan.finish is not None,
            rule=None if plan.evaluate else self._window_rule,
            late=None if batches is None else batches.late,
        )

    def _supersede(self, former: Round, plan: RoundPlan) -> None:
        """Give an unfinished round up for a new one, unless it is another experiment's at work."""
        idle = self._index.clock() - former.last_activity
        patience = max(former.plan.join_seconds, former.plan.window_seconds)
        if former.plan.experiment != plan.experiment and idle < patience:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"the trunk is at work on {former} (last call {idle:.0f} s ago) and serves one "
                f"experiment at a time. Wait for it to end, or for {patience:.0f} s without a call; "
                "or, if its run has gone, free it: flower-split trunk-release ADDRESS --token-file FILE.",
            )
        former.windows.abort(
            f"it was superseded by round {plan.server_round} (attempt {plan.attempt})"
        )
        self._settling.settle(former)

    def _save(self, current: Round, digest: str) -> None:
        """Write the round's checkpoint, or give the round up. The lock is free: disks are slow."""
        started = self._index.clock()
        try:
            with self._compute.aside():
                self._weights.save(current, digest)
            self._index.totals.checkpoint_seconds += self._index.clock() - started
        except OSError as error:
            logger.error("%s: the checkpoint cannot be written: %s", current, error)
            with self._index.changed:
                current.windows.abort(
                    f"the trunk's checkpoint cannot be written to {self._weights.directory}: "
                    f"{error.strerror or error}. The checkpoints before it are intact; free space, "
                    "and resume"
                )
            self._settling.settle(current)

    def _keep(self, current: Round) -> None:
        """Let what ``current`` did stay."""
        current.committed = True
        self._index.totals.rounds_committed += not current.plan.evaluate
        self._weights.keep(current)
        self._activations.clear()
        self._index.changed.notify_all()


def _total_steps(plan: RoundPlan) -> int:
    """Return the trunk's optimizer steps over the whole run, which place the rate's schedule."""
    if plan.step_every is StepEvery.LOCAL_STEP:
        return plan.num_server_rounds * plan.steps_per_round
    if plan.step_every is StepEvery.CONTRIBUTION:
        return plan.num_server_rounds * plan.steps_per_round * len(plan.participants)
    return plan.num_server_rounds


def _num_shares(plan: RoundPlan) -> int:
    """Return the parts of the activation budget: one a client where all run at once, else two."""
    if plan.asynchronous:
        return 1  # dispatches have a budget of their own
    most = 2 if plan.step_every is StepEvery.SERVER_ROUND else len(plan.participants)
    return min(most, len(plan.participants))
