"""The end of a window's step where its parties clip, or step, together.

After its last backward of a window, every client says so with FinishStep, and waits. When all have,
the trunk clips by one norm over the whole model, steps, and answers everybody with the same factor
and, where clients share them, the same reduced gradients. Each client's FinishStep counts once: a
repetition gets the bits of the first reply.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from flower_split.errors import FlowerSplitError, RefusalReason, TrunkRefused
from flower_split.protocol.values import FinishCall, FinishResult, FinishRule
from flower_split.training.grad_norm import grad_norm_squared
from flower_split.trunk.compute.clipping import (
    Beside,
    mean_gradients,
    mean_norm_squared,
    norm_faults,
)
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.ledger import CallKind, CallName
from flower_split.trunk.engine.round_index import RoundIndex, contribution_hash
from flower_split.trunk.engine.round_state import Round
from flower_split.trunk.engine.sessions import StepEnd


class StepEnds:
    """Takes the FinishStep of every client.

    Args:
        index: Finds the open round; holds the engine's lock.
        thread: Where calls take effect.
        settle: Called on the compute thread after every FinishStep that counted.
    """

    def __init__(
        self, index: RoundIndex, thread: ComputeThread, settle: Callable[[Round], None]
    ) -> None:
        self._index = index
        self._thread = thread
        self._settle = settle

    def once(self, call: FinishCall) -> FinishResult:
        """See :meth:`flower_split.trunk.engine.engine.TrunkEngine.finish_step`."""
        arrived = self._index.clock()
        with self._index.changed:
            current, member = self._index.member(call.session, call.epoch)
            name = current.name_of(member, call.key, CallKind.FINISH_STEP)
            rule = current.plan.finish
            if rule is None:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"slot {name.slot} sends FinishStep, and {current} has no steps that end so.",
                )
            future, mine = current.step_ends.claim(name, call.digest)
        if mine:
            end = StepEnd(call.grad_norm_squared, call.gradients, future, arrived)
            self._thread.submit(self._run, current, name, end, rule, call.digest)
        with self._index.changed:
            self._index.wait(
                current,
                lambda _: future.done(),
                call.deadline,
                lambda: f"the end of step {name.window}; {current.windows.waiting_for()}",
            )
        return future.result()

    def _run(
        self, current: Round, name: CallName, end: StepEnd, rule: FinishRule, digest: bytes
    ) -> None:
        """Check and record as one transaction of the compute thread; then the window may step."""
        try:
            check_step_end(end, rule, name.slot)
            with self._index.changed:
                current.require_open()
                check_alike(end.gradients, current.ending, name.slot)
                current.windows.end_step(name.slot, name.window, name.micro_batch)
                current.ending[name.slot] = end
        except FlowerSplitError as error:
            with self._index.changed:
                current.step_ends.forget(name)
                end.future.set_exception(error)
                self._index.changed.notify_all()
            return
        current.ledger_hash ^= contribution_hash(name, digest)
        self._settle(current)


def step_together(
    current: Round,
    slots: Sequence[int],
    reduced: Sequence[Tensor | None],
    rule: FinishRule,
    compute: TrunkCompute,
    clock: Callable[[], float],
) -> None:
    """Step with a complete window and answer its clients. The engine's lock is held.

    Args:
        current: The round.
        slots: Who contributed, in their order.
        reduced: The trunk's gradient.
        rule: The round's rule for the end of a step.
        compute: The trunk module and its optimizer.
        clock: The engine's clock.
    """
    started = clock()
    ends = {slot: current.ending.pop(slot) for slot in slots}
    tokens = _tokens(current, slots)
    shared: dict[str, Tensor] = {}
    if rule.share_gradients:
        mean = mean_gradients({slot: end.gradients for slot, end in ends.items()}, tokens)
        norm_squared = grad_norm_squared(mean.values())
        like = ends[slots[0]].gradients
        shared = {name: tensor.to(like[name].dtype) for name, tensor in mean.items()}
    else:
        norm_squared = mean_norm_squared(
            {slot: end.grad_norm_squared for slot, end in ends.items()}, tokens
        )
    clipping = compute.step(reduced, Beside(rule.max_grad_norm, norm_squared))
    seconds = clock() - started
    for end in ends.values():
        end.future.set_result(
            FinishResult(
                clip_factor=clipping.factor,
                grad_norm=clipping.grad_norm,
                gradients=shared,
                version=compute.version,
                compute_seconds=seconds,
                queue_seconds=max(0.0, started - end.arrived),
            )
        )


def step_end_faults(current: Round, slots: Sequence[int]) -> dict[int, str]:
    """Return the slots whose steps may not end with the others', each with the reason.

    Shared gradients are measured here; where they are not shared, the client's word is looked at.
    The engine's lock is held.
    """
    norms = {
        slot: grad_norm_squared(end.gradients.values())
        if (end := current.ending[slot]).gradients
        else end.grad_norm_squared
        for slot in slots
    }
    return norm_faults(norms, _trunk_norms(current, slots))


def _tokens(current: Round, slots: Sequence[int]) -> dict[int, float]:
    """Return the label tokens that each slot gave to the open window."""
    if current.batches is not None:
        return {slot: current.batches.total.counts[slot].num_tokens for slot in slots}
    return {slot: current.gradients[slot].num_tokens for slot in slots}


def _trunk_norms(current: Round, slots: Sequence[int]) -> dict[int, float]:
    """Return how large the trunk's gradient is of each slot that passes through all of it.

    Of joint batches it is the size of the smashed gradients that stands for it.
    """
    if current.batches is not None:
        counts = {slot: current.batches.total.counts[slot] for slot in slots}
        return {slot: mine.smashed_rms() for slot, mine in counts.items() if mine.cuts is None}
    gradients = {slot: current.gradients[slot] for slot in slots}
    return {slot: g.mean_norm() for slot, g in gradients.items() if g.covers is None}


def check_step_end(end: StepEnd, rule: FinishRule, slot: int) -> None:
    """Refuse gradients that the round did not ask for.

    Raises:
        TrunkRefused: INVALID_REQUEST; nothing was recorded.
    """
    if rule.share_gradients != bool(end.gradients):
        raise TrunkRefused(
            RefusalReason.INVALID_REQUEST,
            f"FinishStep of slot {slot} carries {len(end.gradients)} gradients, and this round's "
            f"clients {'share theirs' if rule.share_gradients else 'keep theirs to themselves'}.",
        )
    for name, tensor in end.gradients.items():
        if not tensor.is_floating_point():
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"slot {slot}: the gradient {name} must be floating-point; it is {tensor.dtype}.",
            )


def check_alike(gradients: Mapping[str, Tensor], ending: Mapping[int, StepEnd], slot: int) -> None:
    """Refuse gradients that are not of the parameters of those who came before.

    Raises:
        TrunkRefused: Names, shapes or dtypes differ (INVALID_REQUEST).
    """
    for other, end in ending.items():
        mine = {name: (tuple(t.shape), t.dtype) for name, t in gradients.items()}
        theirs = {name: (tuple(t.shape), t.dtype) for name, t in end.gradients.items()}
        differing = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        if differing:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"the gradients of slot {slot} are not of the parameters of slot {other}: they "
                f"differ in {', '.join(differing[:4])}. Clients that share gradients need the same "
                "cut layers and LoRA.",
            )
        return  # everybody before was compared with the first
