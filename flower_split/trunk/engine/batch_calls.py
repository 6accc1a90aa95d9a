"""Training calls that are computed together: each is checked when it comes, and a batch when it is whole.

A call is claimed in the ledger as any other, so that it counts once and a repetition gets the same
reply. Then it waits in the round's :class:`~flower_split.trunk.engine.window_batches.WindowBatches`.
A batch is computed, recorded and answered as one transaction of the compute thread; a call that fails in
it fails alone.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.values import BackwardCall, CallResult, ForwardCall
from flower_split.runtime import failpoints
from flower_split.trunk.compute.checks import MASK, InputSchema
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joining import MAX_PADDED, Part
from flower_split.trunk.compute.joint import Divider, Joint
from flower_split.trunk.compute.joint_pass import Given, JointCompute, JointPass
from flower_split.trunk.compute.window_sum import Counted, WindowSum
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.contributions import Contribution, naming
from flower_split.trunk.engine.round_index import RoundIndex, contribution_hash
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.window_batches import Batch, Stage, Waiting, WindowBatches

logger = logging.getLogger(__name__)

# Of a micro-batch's input: what a pass keeps of it until the window has stepped, its padding included.
_KEPT = 2 * MAX_PADDED

Outcomes = dict[int, Tensor | BaseException]  # by slot: what its call is answered with


class BatchCalls:
    """Checks calls that wait for a batch, and computes batches.

    Args:
        index: Finds the open round; holds the engine's lock.
        compute: The trunk module.
        inputs: What a forward may bring.
        thread: Where batches run.
        settle: Called on the compute thread after every backward that counted.
        max_positions: Rows times positions of a pass.
        divider: Divides batches over several devices; None: there is one.
    """

    def __init__(
        self,
        index: RoundIndex,
        compute: TrunkCompute,
        inputs: InputSchema,
        thread: ComputeThread,
        settle: Callable[[Round], None],
        max_positions: int,
        divider: Divider | None = None,
    ) -> None:
        self._index = index
        self._changed, self._clock = index.changed, index.clock
        self._compute = compute
        takes_mask = any(len(form.shape) == 2 for form in inputs.plain.get(MASK, ()))
        local = JointCompute(compute, takes_mask=takes_mask, max_positions=max_positions)
        self._joint: Joint = (
            local if divider is None else divider.divided(local, takes_mask=takes_mask)
        )
        self._thread = thread
        self._settle = settle

    def batches(self) -> WindowBatches:
        """Return the batches of a new round."""
        return WindowBatches(self._start, WindowSum(self._joint, self._compute.covers))

    def admit(self, item: Contribution, future: Future[CallResult]) -> None:
        """Check a call that was claimed, and let it wait for its batch. The engine's lock is held.

        Raises:
            TrunkRefused: The call is refused, with its reason; nothing was recorded.
        """
        current, batches, call = item.round, item.round.batches, item.call
        assert batches is not None, "only rounds with batches admit calls to them"
        current.require_open()
        if isinstance(call, ForwardCall):
            batches.check_forward(item.name, call.last)
            current.activations.reserve(item.place, self._kept_bytes(call.tensors["hidden_states"]))
        else:
            self._check_backward(item, call, batches)
        batches.put(Waiting(item, future), last=call.last)
        current.go_on()

    def _check_backward(
        self, item: Contribution, call: BackwardCall, batches: WindowBatches
    ) -> None:
        current, name = item.round, item.name
        current.windows.check(name.slot, name.window)
        one = batches.check_backward(name, call.last)
        if not one.activation.version == call.version == current.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"the forward of slot {name.slot} ran at version {one.activation.version} (the client "
                f"says {call.version}); the weights are at {current.version}. Run it again.",
            )
        shape = one.shape_of(name.slot)
        if call.grad.shape != shape:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"trunk_output_grad has shape {tuple(call.grad.shape)}; the forward's output has "
                f"{tuple(shape)}.",
            )

    def _kept_bytes(self, hidden: Tensor) -> int:
        return int(_KEPT * hidden.numel() * self._compute.dtype.itemsize)

    def _start(self, batch: Batch, calls: list[Waiting]) -> None:
        """Ask the compute thread for a batch; where it has ended, answer the calls."""
        try:
            asked = self._thread.submit(self._run, batch, calls)
        except RuntimeError:
            _give_up(calls)
        else:
            asked.add_done_callback(partial(_give_up_cancelled, calls))

    def _run(self, batch: Batch, calls: list[Waiting]) -> None:
        """Compute, record and answer as one transaction of the compute thread; then settle."""
        current, started = calls[0].item.round, self._clock()
        backward = batch.stage is Stage.COMPUTING_BACKWARD
        version = current.version
        try:
            run = self._backward if backward else self._forward
            outcomes = run(current, batch, calls)
        except BaseException as error:
            with self._changed:
                batch.stage = Stage.DONE
            outcomes = dict.fromkeys((waiting.item.name.slot for waiting in calls), error)
        self._record(current, calls, outcomes, self._clock() - started)
        failpoints.reach("trunk.backward.accumulated" if backward else "trunk.forward.computed")
        seconds = self._clock() - started
        for waiting in calls:
            outcome = outcomes[waiting.item.name.slot]
            if isinstance(outcome, Tensor):
                queued = started - waiting.item.arrived
                waiting.future.set_result(CallResult(outcome, version, seconds, queued))
            else:
                waiting.future.set_exception(naming(outcome, waiting.item.name.slot))
        self._settle(current)

    def _record(
        self, current: Round, calls: Sequence[Waiting], outcomes: Outcomes, seconds: float
    ) -> None:
        """Note who had how much of the time, what counted, and what may be tried again."""
        sizes = [_num_elements(waiting.item.call) for waiting in calls]
        with self._changed:
            current.compute_seconds += seconds
            spent = current.usage.compute_seconds
            for waiting, size in zip(calls, sizes, strict=True):
                name, call = waiting.item.name, waiting.item.call
                spent[name.slot] = spent.get(name.slot, 0.0) + seconds * size / sum(sizes)
                if not isinstance(outcomes[name.slot], Tensor):
                    current.ledger.forget(name)
                    current.activations.release(waiting.item.place)
                elif isinstance(call, BackwardCall):
                    current.ledger_hash ^= contribution_hash(name, call.digest)

    def _there(self, current: Round, calls: Sequence[Waiting]) -> tuple[list[Waiting], Outcomes]:
        """Return the calls whose slots still take part, and the others' outcomes. The lock is held."""
        there: list[Waiting] = []
        outcomes: Outcomes = {}
        for waiting in calls:
            name = waiting.item.name
            try:
                current.windows.check(name.slot, name.window)
                there.append(waiting)
            except TrunkRefused as refusal:
                outcomes[name.slot] = refusal
        return there, outcomes

    def _forward(self, current: Round, batch: Batch, calls: Sequence[Waiting]) -> Outcomes:
        with self._changed:
            current.require_open()
            there, outcomes = self._there(current, calls)
            window, server_round = current.windows.window, current.plan.server_round
        parts = [
            Part(
                slot=waiting.item.name.slot,
                tensors=waiting.item.call.tensors,
                use_cache=waiting.item.call.use_cache,
                cuts=waiting.item.member.cuts,
            )
            for waiting in there
            if isinstance(waiting.item.call, ForwardCall)
        ]
        made = self._joint.forward(
            parts,
            f"{server_round}/{window}/batch/{batch.micro_batch}",
            partial(self._keep, current, window, batch.micro_batch),
        )
        with self._changed:
            assert current.batches is not None
            current.batches.forwarded(batch, made.passes, made.outputs)
        if len(made.passes) > 1:
            logger.debug(
                "%s: batch %d of window %d takes %d passes",
                current,
                batch.micro_batch,
                window,
                len(made.passes),
            )
        return {**outcomes, **made.outputs, **made.failures}

    def _keep(self, current: Round, window: int, micro_batch: int, one: JointPass) -> None:
        """Keep a pass within the budget, before the next one is made."""
        shares = {(slot, window, micro_batch): share for slot, share in one.shares().items()}
        with self._changed:
            current.activations.put_joint(shares, one.activation)

    def _backward(self, current: Round, batch: Batch, calls: Sequence[Waiting]) -> Outcomes:
        with self._changed:
            current.require_open()
            there, outcomes = self._there(current, calls)
        items = {w.item.name.slot: w.item for w in there}
        given = {
            slot: Given(item.call.grad, item.call.loss_denominator)
            for slot, item in items.items()
            if isinstance(item.call, BackwardCall)
        }
        made = self._joint.backward(batch.passes, given)
        outcomes |= made.failures
        with self._changed:
            counted: list[Counted] = []
            for slot in sorted(made.smashed_grads):
                item, call = items[slot], items[slot].call
                assert isinstance(call, BackwardCall)
                norm = made.norms_squared[slot]
                counted.append(Counted(slot, call.num_tokens, call.loss_denominator, norm))
                try:
                    current.windows.contribute(
                        slot,
                        item.name.window,
                        item.name.micro_batch,
                        num_tokens=call.num_tokens,
                        last=call.last,
                    )
                except TrunkRefused as refusal:  # it left while this was computed
                    outcomes[slot] = refusal
                else:
                    outcomes[slot] = made.smashed_grads[slot]
                    current.activations.hold(item.place, self._kept_bytes(call.grad))
            assert current.batches is not None
            current.batches.total.add(batch.micro_batch, batch.passes, made.gradients, counted)
            batch.stage = Stage.DONE
            current.after_contribution()
            self._changed.notify_all()
        return outcomes


def _num_elements(call: ForwardCall | BackwardCall) -> int:
    """Return the elements of a call's smashed data, or of its gradient."""
    if isinstance(call, ForwardCall):
        return call.tensors["hidden_states"].numel()
    return call.grad.numel()


def _give_up(calls: Sequence[Waiting]) -> None:
    for waiting in calls:
        waiting.future.set_exception(RoundAborted("the trunk is shutting down."))


def _give_up_cancelled(calls: Sequence[Waiting], asked: Future[None]) -> None:
    if asked.cancelled():
        _give_up(calls)
