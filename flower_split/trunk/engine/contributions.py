"""Training calls with one effect each: a forward that is kept, a backward that counts, and its step.

A call's first arrival claims its name in the ledger and runs on the compute thread; a repetition
waits for the same reply. Everything is checked before anything is accumulated, so that a call that
is refused leaves no trace. The contribution that completes a window lets the trunk step, within the
same transaction of the compute thread.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flower_split.errors import FlowerSplitError, RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import BackwardCall, CallResult, ForwardCall
from flower_split.runtime import failpoints
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction, SlotGradient, faults, given_by, outliers
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.ledger import CallName, reply_of
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_index import RoundIndex, contribution_hash
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.sessions import Session
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.engine.step_ends import step_end_faults, step_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """A training call and whom it is of."""

    round: Round
    member: Session
    name: CallName
    call: ForwardCall | BackwardCall
    arrived: float  # on the engine's clock

    @property
    def place(self) -> tuple[int, int, int]:
        """Slot, window and micro-batch: the key of its activations."""
        return (self.name.slot, self.name.window, self.name.micro_batch)


Admit = Callable[[Contribution, "Future[CallResult]"], None]


class Contributions:
    """The training calls of the open round, and of the dispatches of an asynchronous one.

    Args:
        index: Finds the open round; holds the engine's lock.
        compute: The trunk module.
        thread: Where calls run.
        settle: Called on the compute thread after every backward that counted.
        shares: What one client may take of a round.
        admit: Checks a call of a round with joint batches, and lets it wait for its batch.
    """

    def __init__(
        self,
        index: RoundIndex,
        compute: TrunkCompute,
        thread: ComputeThread,
        settle: Callable[[Round], None],
        shares: Shares,
        admit: Admit,
    ) -> None:
        self._index = index
        self._changed = index.changed
        self._clock = index.clock
        self._compute = compute
        self._thread = thread
        self._settle = settle
        self._shares = shares
        self._admit = admit

    def once(self, item: Contribution) -> CallResult:
        """Run a call, or wait for the reply of its first arrival.

        A forward first waits until the weights have the version that it asks for.

        Raises:
            TrunkRefused: The call is refused, with its reason; nothing was accumulated.
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first; the call may yet take effect.
        """
        if item.round.batches is not None:
            return self._together(item)
        with self._changed:
            future, mine = self._claim(item)
        if mine:
            self._thread.turns.put(item.member.id, partial(self._run, item, future), future)
            self._thread.submit(self._thread.turns.run_next)
        return reply_of(future, item.call.deadline - self._clock())

    def _together(self, item: Contribution) -> CallResult:
        """Let a call wait for the others of its batch, and for its reply."""
        current, name, call = item.round, item.name, item.call
        with self._changed:
            future, mine = self._claim(item)
            if mine:
                try:
                    self._admit(item, future)
                except FlowerSplitError as error:
                    current.ledger.forget(name)
                    future.set_exception(error)
        try:
            return reply_of(future, call.deadline - self._clock())
        except TrunkUnavailable as error:
            with self._changed:
                late = current.windows.waiting_for()
            raise TrunkUnavailable(
                f"{error} It is computed with the other clients': {late}."
            ) from None

    def _claim(self, item: Contribution) -> tuple[Future[CallResult], bool]:
        """Return the call's reply, and whether it must be run; the lock is free while it waits.

        A forward says which replies its client has: they make room for its own.
        """
        current, name, call = item.round, item.name, item.call
        if isinstance(call, ForwardCall):
            while not current.may_forward(name, call.version, self._clock()):
                self._index.pause(call.deadline, lambda: current.awaited(call.version))
                current.require_open()
            acknowledged = min(call.acknowledged, name.micro_batch)
            current.ledger.acknowledge(name.slot, name.window, acknowledged)
            current.step_ends.acknowledge(name.slot, name.window)
            num_bytes = call.tensors["hidden_states"].nbytes
        else:
            num_bytes = call.grad.nbytes
        room = self._shares.held_bytes
        given = current.gradients.get(name.slot)
        if given is not None and name.micro_batch != given.following:
            room -= given.waiting_bytes  # but for the micro-batch that the others wait for
        future, mine = current.ledger.claim(name, call.digest, num_bytes, room)
        if mine and self._shares.compute_seconds:
            try:
                self._shares.check_seconds(current.usage, name.slot)
            except TrunkRefused:
                current.ledger.forget(name)
                raise
        return future, mine

    def _run(self, item: Contribution, future: Future[CallResult]) -> None:
        """Compute, record and settle as one transaction of the compute thread."""
        current, started = item.round, self._clock()
        failure: BaseException | None = None
        try:
            if isinstance(item.call, ForwardCall):
                tensor, version = self._forward(item, item.call)
            else:
                tensor, version = self._backward(item, item.call)
        except BaseException as error:
            failure = error
        seconds = self._clock() - started
        with self._changed:
            spent = current.usage.compute_seconds
            spent[item.name.slot] = spent.get(item.name.slot, 0.0) + seconds
            current.compute_seconds += seconds
            if failure is not None:
                current.ledger.forget(item.name)
        if failure is not None:
            future.set_exception(naming(failure, item.name.slot))
            return
        result = CallResult(tensor, version, seconds, started - item.arrived)
        if isinstance(item.call, ForwardCall):
            if failpoints.armed:
                failpoints.reach("trunk.forward.computed")
            future.set_result(result)
            return
        current.ledger_hash ^= contribution_hash(item.name, item.call.digest)
        if failpoints.armed:
            failpoints.reach("trunk.backward.accumulated")
        future.set_result(result)
        self._settle(current)

    def _forward(self, item: Contribution, call: ForwardCall) -> tuple[Tensor, int]:
        """Run a forward and keep what its backward needs; return its output and version."""
        current, name = item.round, item.name
        hidden, place = call.tensors["hidden_states"], item.place
        with self._changed:
            current.require_open()
            version = current.version
            seed_of, weights = current.seed_name(name), current.weights
            current.activations.require_room(
                name.slot, hidden.numel() * self._compute.dtype.itemsize
            )
        output, activation = self._compute.forward_train(
            call.tensors,
            seed_of=seed_of,
            use_cache=call.use_cache,
            cuts=item.member.cuts,
            weights=weights,
        )
        with self._changed:
            current.activations.put(place, activation)
        return output, version

    def _backward(self, item: Contribution, call: BackwardCall) -> tuple[Tensor, int]:
        """Run a backward and add its gradients to the open window, or do neither.

        Returns:
            ``smashed_grad``, and the version that it is of.
        """
        current, name, place = item.round, item.name, item.place
        with self._changed:
            current.require_open()
            version = current.version
            current.windows.check(name.slot, name.window)
            activation = current.activations.get(place)
        if activation is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_CONTRIBUTION,
                f"slot {name.slot} sends a backward for window {name.window}, micro-batch "
                f"{name.micro_batch}, without a forward that the trunk still holds.",
            )
        if not activation.version == call.version == version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"the forward of slot {name.slot} ran at version {activation.version} (the client "
                f"says {call.version}); the weights are at {version}. Run it again.",
            )
        smashed_grad, gradients = self._compute.backward(activation, call.grad)
        with self._changed:
            # The window decides first: what it refuses must not have been added.
            current.windows.contribute(
                name.slot,
                name.window,
                name.micro_batch,
                num_tokens=call.num_tokens,
                last=call.last,
            )
            if current.trains:
                # Where every contribution is a step of its own, each is the first of its step.
                alone = current.windows.step_every is StepEvery.CONTRIBUTION
                cuts = item.member.cuts
                covers = None if cuts is None else self._compute.covers(cuts)
                current.gradients.setdefault(name.slot, SlotGradient(covers)).add(
                    0 if alone else name.micro_batch,
                    gradients,
                    num_tokens=call.num_tokens,
                    loss_denominator=call.loss_denominator,
                )
            current.open_contribution = None
            current.activations.release(place)
            current.after_contribution()
            if current.windows.step_every is StepEvery.CONTRIBUTION:  # else they wait for the step
                self._changed.notify_all()
        return smashed_grad, version


def naming(error: BaseException, slot: int) -> BaseException:
    """Return ``error``; a refusal of NaN or Inf says whose tensor it was."""
    if isinstance(error, TrunkRefused) and error.reason is RefusalReason.NON_FINITE:
        return TrunkRefused(error.reason, f"slot {slot}: {error}")
    return error


class WindowSteps:
    """Steps with complete windows, and rolls back aborted rounds.

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
        """Step with every complete window, or roll back an aborted round.

        The engine's lock is held while it steps: nobody sees a window that is complete and has not.
        """
        with self._index.changed:
            if current is not self._index.round:
                return
            try:
                self._step(current)
            except Exception as error:
                logger.exception("the optimizer step failed in %s", current)
                current.windows.abort(f"the trunk's optimizer step failed: {error}")
            if current.windows.phase is Phase.ABORTED and not current.rolled_back:
                current.rolled_back = True
                self._index.totals.rounds_aborted += not current.plan.evaluate
                self._compute.restore(current.before)
                current.forget_work()
                self._index.changed.notify_all()
                level = logging.INFO if current.plan.evaluate else logging.WARNING
                logger.log(level, "%s aborted: %s", current, current.windows.problem)
            if current.batches is not None:
                current.go_on()

    def _step(self, current: Round) -> None:
        """Step while a window is complete; where somebody is at fault, take them out and look again."""
        windows = current.windows
        alone = windows.step_every is StepEvery.CONTRIBUTION
        while slots := windows.due(current.gradients):
            self._index.changed.notify_all()  # they look once the lock is free
            if current.trains:
                rule = current.plan.finish
                total = None if current.batches is None else current.batches.total
                each = {} if total is not None else given_by(slots, current.gradients)
                bad = total.faults(slots) if total else faults(each, whole_step=not alone)
                if rule is not None and not bad:
                    bad = step_end_faults(current, slots)
                factor = self._reduction.outlier_factor
                bad = bad or (total.outliers(slots, factor) if total else outliers(each, factor))
                if bad:
                    self._blame(current, bad)
                    continue
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
