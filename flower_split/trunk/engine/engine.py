"""The trunk's engine: sessions, exactly-once calls, windows, optimizer steps. Never grpc.

Shapes: hidden states and their gradients are ``[batch, seq, hidden]``; the padding mask
``[batch, seq]``; position ids ``[batch or 1, seq]``. Times are seconds of ``time.monotonic``.

One thread computes, and it alone changes the weights: a call is checked, computed, recorded and
(where it completes a window) stepped as one transaction. A window's gradient is ``Σ nᵢ gᵢ / Σ nᵢ``
over its clients, weighted by label tokens and reduced in slot order, whatever the order of arrival.
:mod:`flower_split.trunk.engine.round_index` says which lock guards what.

Next: ``flower_split/trunk/compute/compute.py``.
"""

import logging
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import (
    BackwardCall,
    CallResult,
    FinishCall,
    FinishResult,
    ForwardCall,
    ForwardMode,
    SessionGrant,
)
from flower_split.split import CutLayers
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.checks import InputSchema
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.compute.joint import Divider
from flower_split.trunk.compute.kv_caches import CacheStore
from flower_split.trunk.compute.schema_probe import schema_of
from flower_split.trunk.engine.batch_calls import BatchCalls
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.committed_weights import CommittedWeights
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.contributions import Contribution, Contributions
from flower_split.trunk.engine.coordinator_side import CoordinatorSide
from flower_split.trunk.engine.deadlines import Deadlines
from flower_split.trunk.engine.dispatches import Dispatches
from flower_split.trunk.engine.leaving_side import LeavingSide
from flower_split.trunk.engine.ledger import CallKind
from flower_split.trunk.engine.operator_side import OperatorSide
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.round_lifecycle import RoundLifecycle
from flower_split.trunk.engine.sessions import check_fingerprint, new_epoch
from flower_split.trunk.engine.settling import Settling
from flower_split.trunk.engine.shares import Shares
from flower_split.trunk.engine.step_ends import StepEnds
from flower_split.trunk.engine.unrecorded import UnrecordedForwards
from flower_split.trunk.engine.watching import Pulse, Waits
from flower_split.trunk.engine.window_rules import QuorumAlone, WindowRule

logger = logging.getLogger(__name__)


class TrunkEngine(CoordinatorSide, LeavingSide, OperatorSide):
    """The trunk of one model, for one experiment at a time.

    Args:
        compute: The trunk module and its optimizer.
        mode: ``joint``, ``frozen`` or ``forward-only``.
        hidden_size: Width of the hidden states; anything else is refused.
        fingerprint: What a client must agree with, field by field.
        activation_bytes: Budget of saved activations, over all clients.
        activation_bytes_per_client: Budget of one client; 0: no limit of its own.
        reduction: How the clients' gradients of a window become one.
        cache_bytes: Budget of the key-value caches of generation, over all clients.
        weight_bytes: Budget of former weights, for clients that work on them in asynchronous rounds.
        checkpoints: Where rounds are kept before they are committed; None: a trunk that restarts
            can go on only with a new experiment.
        inputs: What a forward may bring; None: the trunk's model is asked now.
        window_rule: Whether a window goes on without somebody; None: as the quorum says.
        shares: What one client may take of a round.
        batch_positions: Rows times positions of one pass, where the clients' micro-batches of one place
            in a window are one batch, in rounds that step with every local step; 0: each is computed
            alone. ``reduction`` must be the mean otherwise.
        divider: Divides such batches over several devices; None: there is one.
        clock: Monotonic seconds; tests pass their own.

    Raises:
        ConfigError: There are window batches, and a reduction that needs each client's gradient.

    Attributes:
        compute: The trunk module and its optimizer; the compute thread's while a round is open.
        device: On which calls find their tensors soonest.
        window_batches: Whether there are such batches: a backward, too, waits for other clients.
        knows_token: ``knows_token(token)`` returns whether a token is a participant's of the round
            begun last. Waits for no lock.
        count_bytes: ``count_bytes(session, received, sent)`` adds a call's bytes on the wire to its
            slot's totals.
    """

    def __init__(
        self,
        compute: TrunkCompute,
        *,
        mode: str,
        hidden_size: int,
        fingerprint: Mapping[str, str],
        activation_bytes: int,
        activation_bytes_per_client: int = 0,
        reduction: Reduction | None = None,
        cache_bytes: int = 1 << 30,
        weight_bytes: int = 1 << 30,
        checkpoints: CheckpointStore | None = None,
        inputs: InputSchema | None = None,
        window_rule: WindowRule | None = None,
        shares: Shares | None = None,
        batch_positions: int = 0,
        divider: Divider | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epoch, self.mode, self.hidden_size = new_epoch(), mode, hidden_size
        self.device, self.window_batches = compute.device, batch_positions > 0
        self.fingerprint, self._shares = dict(fingerprint), shares or Shares()
        trains = mode == "joint"
        reduction = (reduction or Reduction()).checked(batches=batch_positions > 0)
        self._inputs = inputs or schema_of(compute.trunk, hidden_size)
        self.compute, self._clock, self._started = compute, clock, clock()
        dispatches = Dispatches(
            compute,
            trains=trains,
            activations=ActivationCache(activation_bytes, activation_bytes_per_client),
            weight_bytes=weight_bytes,
            clock=clock,
        )
        index = self._index = RoundIndex(dispatches, self.epoch, clock)
        self._changed = index.changed
        self.knows_token, self.count_bytes = index.knows_token, index.count_bytes
        self._weights = CommittedWeights(compute, checkpoints)
        self._settling = Settling(index, compute, reduction)
        settle, thread = self._settling.settle, ComputeThread(compute, clock)
        self._thread = thread
        joint = BatchCalls(index, compute, self._inputs, thread, settle, batch_positions, divider)
        self._lifecycle = RoundLifecycle(
            index,
            self._settling,
            compute,
            weights=self._weights,
            activations=ActivationCache(activation_bytes, activation_bytes_per_client),
            reduction=reduction,
            trains=trains,
            window_rule=window_rule or QuorumAlone(),
            make_batches=joint.batches if batch_positions else None,
        )
        caches = CacheStore(compute, cache_bytes, clock, self._shares.held_bytes)
        self._unrecorded = UnrecordedForwards(index, compute, thread, caches, self._shares)
        shares, admit = self._shares, joint.admit
        self._contributions = Contributions(index, compute, thread, settle, shares, admit)
        self._step_ends = StepEnds(index, thread, settle)
        self._pulse, self._waits = Pulse(self._thread.submit, clock), Waits()
        self._deadlines = Deadlines(index, self.expire, self._unrecorded.free_caches, self.look)

    # ------------------------------------------------------------------ clients

    def open_session(
        self,
        token: str,
        fingerprint: Mapping[str, str],
        planned_steps: int,
        evaluate: bool,
        cuts: CutLayers | None = None,
    ) -> SessionGrant:
        """Let a client join the open round. Safe to retry: the same token gets the same session.

        Args:
            token: From the strategy, for this client and this round.
            fingerprint: Fingerprint of the client's model and configuration.
            planned_steps: Optimizer steps it will take; ignored for evaluation.
            evaluate: Whether it only evaluates.
            cuts: The client's own cut layers, within the trunk's: its calls run what is between
                them. None: all of the trunk, and the fingerprint's cut layers must be the trunk's.

        Raises:
            TrunkRefused: No round is open, the token is not of it, the fingerprint differs, or the
                trunk cannot run what is between ``cuts``.
            RoundAborted: The round was given up.
        """
        with self._changed:
            self._index.of_token(token).slot_of(token)  # before anything is computed for it
        if cuts is not None and not self.compute.spans.is_admitted(cuts):
            self._thread.do(lambda: self.compute.spans.admit(cuts))
        with self._changed:
            current = self._index.of_token(token)
            slot = current.slot_of(token)
            check_fingerprint(
                self.fingerprint, fingerprint, slot, own_cuts=cuts is not None, evaluate=evaluate
            )
            if evaluate != current.plan.evaluate:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"{current} is {'an evaluation' if current.plan.evaluate else 'for training'}; "
                    f"slot {slot} wants to {'evaluate' if evaluate else 'train'}.",
                )
            if not evaluate:
                current.windows.join(slot, planned_steps, self._clock())
                current.go_on()
            session = current.seat(slot, planned_steps, cuts)
            self._index.touch(current, slot)
            logger.info("%s: slot %d joined", current, slot, extra={"slot": slot})
            return SessionGrant(
                session=session.id,
                epoch=self.epoch,
                version=current.before.version,
                experiment=current.plan.experiment,
                server_round=current.plan.server_round,
                attempt=current.plan.attempt,
                lease_seconds=current.plan.window_seconds,
                slot=slot,
                finish=None if evaluate else current.plan.finish,
            )

    def forward(self, call: ForwardCall) -> CallResult:
        """Return ``trunk_output`` of one micro-batch.

        In training with a step per local step it waits until the weights have the version asked for:
        the clients of a window go on together. Safe to retry with the same key and content.

        Raises:
            TrunkRefused: The call is refused, with its reason.
            RoundAborted: The round was given up while this call waited.
            TrunkUnavailable: The deadline passed first.
        """
        arrived = self._clock()
        with self._changed:
            current, member = self._index.member(call.session, call.epoch)
            evaluates = call.mode is ForwardMode.EVALUATE
            if evaluates and not current.plan.evaluate:
                self._shares.take_evaluation(current.usage, member.slot)
            name = None if evaluates else current.name_of(member, call.key, CallKind.FORWARD)
        on_cpu = self.device.type == "cpu"
        # Batches of a GPU look for NaN at all of their calls at once: a look is a wait there.
        alone = on_cpu or call.mode is not ForwardMode.TRAIN or current.batches is None
        call = self._inputs.forward(call, member.slot, look=alone)
        if name is None:
            return self._unrecorded.evaluate(call, current, member)
        if call.mode is ForwardMode.NO_GRAD:
            result = self._unrecorded.forward(call, current, member, current.seed_name(name))
            with self._changed:
                current.windows.slots[member.slot].contributions += 1
            return result
        if self.mode == "forward-only":
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                'the trunk runs in mode "forward-only" and keeps nothing for a backward.',
            )
        return self._contributions.once(Contribution(current, member, name, call, arrived))

    def backward(self, call: BackwardCall) -> CallResult:
        """Return ``smashed_grad`` of one micro-batch; its parameter gradients join the open window.

        Safe to retry with the same key and content: the gradient counts once.

        Raises:
            TrunkRefused: The call is refused, with its reason; nothing was accumulated.
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first; the call may yet take effect, so retry it.
        """
        arrived = self._clock()
        with self._changed:
            current, member = self._index.member(call.session, call.epoch)
            name = current.name_of(member, call.key, CallKind.BACKWARD)
        look = self.device.type == "cpu" or current.batches is None
        self._inputs.check_backward(call, member.slot, look=look)
        return self._contributions.once(Contribution(current, member, name, call, arrived))

    def finish_step(self, call: FinishCall) -> FinishResult:
        """End a client's step: wait until the window has stepped, and return how it was clipped.

        In rounds whose plan has a :class:`~flower_split.protocol.values.FinishRule`, every client
        calls it after the reply to its last backward of a window. Safe to retry with the same key
        and content: the same bits come back.

        Raises:
            TrunkRefused: The call is refused, with its reason; nothing was recorded.
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first; the call may yet take effect, so retry it.
        """
        return self._step_ends.once(call)

    def wait_version(self, session: str, epoch: int, version: int, deadline: float) -> int:
        """Wait until the weights have ``version``, and return the version they have.

        Raises:
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        with self._changed:
            current, _ = self._index.member(session, epoch)
            self._index.wait(
                current,
                lambda _: self.compute.version >= version,
                deadline,
                lambda: f"version {version} of the trunk's weights",
            )
            return self.compute.version

    def close_session(self, session: str, epoch: int) -> None:
        """Let a client leave. Idempotent; before all planned steps, it gives its place up."""
        with self._changed:
            current = self._index.of_session(session)
            if current is None or epoch != self.epoch:
                return
            member = current.sessions[session]
            current.closed.add(session)
            logger.info("%s: slot %d left", current, member.slot, extra={"slot": member.slot})
            if current.plan.evaluate or self.mode != "joint":
                current.windows.slots[member.slot].finished = True
                return
            if current.windows.slots[member.slot].finished:
                return
        self._thread.do(
            lambda: self._settling.drop(current, member.slot, "it closed its session early")
        )

    def adapter(self) -> dict[str, Tensor]:
        """Return the trainable parameters as fp32 copies on the CPU, by the unsplit model's names."""
        return self._thread.do(self.compute.adapter)

    def close(self, why: str = "the trunk is shutting down") -> None:
        """End the engine's threads; whoever waits is told that the round is over, and why."""
        with self._changed:
            current = self._index.round
            if current is not None and not current.committed:
                current.windows.abort(why)
            for dispatch in self._index.dispatches.all():
                dispatch.windows.abort(why)
            if current is not None:
                current.go_on()
            self._changed.notify_all()
        self._deadlines.close()
        self._thread.close()

    # ------------------------------------------------------------------ the process it runs in

    def expire(self) -> None:
        """Act on deadlines and leases that have ended; the deadline thread calls it."""
        current = self._settling.expire()
        if current is not None:
            self._thread.do(lambda: self._settling.settle(current))

    def keep_as_initial(self) -> None:
        """Let every experiment begin with the weights as they are now."""
        self._thread.do(self._weights.keep_as_initial)
