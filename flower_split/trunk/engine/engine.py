"""The trunk's engine: sessions, exactly-once calls, windows, optimizer steps. Never grpc.

Shapes: hidden states and their gradients are ``[batch, seq, hidden]``; the padding mask
``[batch, seq]``; position ids ``[batch or 1, seq]``. Times are seconds of ``time.monotonic``.

One thread computes, and it alone changes the weights: a call is checked, computed, recorded and
(where it completes a window) stepped as one transaction. A window's gradient is ``Σ nᵢ gᵢ / Σ nᵢ``
over its clients, weighted by label tokens and reduced in slot order, whatever the order of arrival.

Next: ``flower_split/trunk/compute/compute.py``.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    Arrival,
    CallResult,
    ContributionKey,
    ForwardMode,
    RoundPlan,
    RoundReport,
    SessionGrant,
    TrunkStatus,
)
from flower_split.runtime import failpoints
from flower_split.split import CutLayers
from flower_split.split.structure.kv_cache import CacheStep
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.checks import check_fingerprint, check_tensors
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.gradients import Reduction
from flower_split.trunk.compute.kv_caches import CacheStore
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.contributions import Contributions
from flower_split.trunk.engine.deadlines import Watchdog
from flower_split.trunk.engine.dispatches import Flight, Flights
from flower_split.trunk.engine.ledger import CallKind, CallName
from flower_split.trunk.engine.round_lifecycle import RoundKeeper
from flower_split.trunk.engine.round_state import (
    Round,
    Session,
    contribution_hash,
    seed_name,
)
from flower_split.trunk.engine.waiting import WaitingRoom

logger = logging.getLogger(__name__)


class TrunkEngine:
    """The trunk of one model, for one experiment at a time.

    Args:
        compute: The trunk module and its optimizer.
        mode: ``joint``, ``frozen`` or ``forward-only``.
        hidden_size: Width of the hidden states; anything else is refused.
        fingerprint: What a client must agree with, field by field.
        activation_bytes: Budget of saved activations, over all clients.
        activation_bytes_per_client: Of one client; 0: no limit of its own.
        reduction: How the clients' gradients of a window become one.
        cache_bytes: Budget of the key-value caches of generation, over all clients.
        weight_bytes: Budget of former weights, for clients that work on them in asynchronous rounds.
        checkpoints: Where rounds are kept before they are committed; None: a trunk that restarts
            can go on only with a new experiment.
        clock: Monotonic seconds; tests pass their own.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epoch = secrets.randbits(63)
        self.mode = mode
        self.hidden_size = hidden_size
        self.fingerprint = dict(fingerprint)
        self._compute = compute
        self._clock = clock
        self._changed = threading.Condition()  # guards the round
        self._keeper = RoundKeeper(
            compute,
            trains=mode == "joint",
            activations=ActivationCache(activation_bytes, activation_bytes_per_client),
            reduction=reduction or Reduction(),
            flights=Flights(
                compute,
                trains=mode == "joint",
                activations=ActivationCache(activation_bytes, activation_bytes_per_client),
                weight_bytes=weight_bytes,
                clock=clock,
            ),
            epoch=self.epoch,
            changed=self._changed,
            checkpoints=checkpoints,
            clock=clock,
        )
        self._caches = CacheStore(compute, cache_bytes, clock)
        self._worker = ComputeThread(compute, clock)
        self._contributions = Contributions(self._keeper, compute, self._changed)
        self._waiting = WaitingRoom(self._keeper, compute, self._changed, clock)
        self._watchdog = Watchdog(
            self._keeper, self._worker, self._changed, clock, self._free_caches
        )

    # ------------------------------------------------------------------ clients

    def open_session(
        self,
        token: str,
        fingerprint: Mapping[str, str],
        planned_steps: int,
        evaluate: bool,
        cuts: CutLayers | None = None,
    ) -> SessionGrant:
        """A client joins the open round. Safe to retry: the same token gets the same session.

        Args:
            token: From the strategy, for this client and this round.
            fingerprint: Of the client's model and configuration.
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
            self._keeper.round_of_token(token).slot_of(token)
        if cuts is not None and not self._compute.spans.is_admitted(cuts):
            self._worker.do(lambda: self._compute.spans.admit(cuts))
        with self._changed:
            current = self._keeper.round_of_token(token)
            slot = current.slot_of(token)
            check_fingerprint(self.fingerprint, fingerprint, slot, own_cuts=cuts is not None)
            if evaluate != current.plan.evaluate:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"{current} is {'an evaluation' if current.plan.evaluate else 'for training'}; "
                    f"slot {slot} wants to {'evaluate' if evaluate else 'train'}.",
                )
            if not evaluate:
                current.windows.join(slot, planned_steps, self._clock())
            session = next((s for s in current.sessions.values() if s.slot == slot), None)
            if session is None:
                session = Session(secrets.token_hex(16), slot, planned_steps, cuts)
                current.sessions[session.id] = session
                current.cuts[slot] = cuts
            elif session.cuts != cuts:
                raise TrunkRefused(
                    RefusalReason.INVALID_REQUEST,
                    f"slot {slot} joined with cut layers {session.cuts} and now says {cuts}; they "
                    "cannot change within a round.",
                )
            current.closed.discard(session.id)  # a client may come back with its token
            self._keeper.touch(current, slot)
            return SessionGrant(
                session=session.id,
                epoch=self.epoch,
                version=current.before.version,
                experiment=current.plan.experiment,
                server_round=current.plan.server_round,
                attempt=current.plan.attempt,
                lease_seconds=current.plan.window_seconds,
                slot=slot,
            )

    def forward(
        self,
        session: str,
        epoch: int,
        key: ContributionKey | None,
        version: int,
        mode: ForwardMode,
        tensors: Mapping[str, Tensor],
        digest: bytes,
        deadline: float,
        acknowledged: int = 0,
        use_cache: bool | None = None,
        cache: CacheStep | None = None,
        released: Sequence[int] = (),
    ) -> CallResult:
        """``trunk_output`` of one micro-batch.

        In training with a step per local step it waits until the weights have the version asked for:
        the clients of a window go on together. Safe to retry with the same key and content.

        Args:
            session: From :meth:`open_session`.
            epoch: From :meth:`open_session`.
            key: Names the micro-batch; ``None`` for evaluation.
            version: The version that the client expects.
            mode: What to keep.
            tensors: ``hidden_states``, and optionally ``attention_mask`` and ``position_ids``.
            digest: Of the request's content.
            deadline: When to give up waiting.
            acknowledged: The client has the replies of all micro-batches of this window below it;
                they are released.
            use_cache: As the model's own argument.
            cache: In evaluation: go on from this key-value cache, and keep it.
            released: The session's key-value caches that the client is done with.

        Raises:
            TrunkRefused: With its reason.
            RoundAborted: The round was given up while this call waited.
            TrunkUnavailable: The deadline passed first.
        """
        arrived = self._clock()
        with self._changed:
            current, member = self._keeper.member(session, epoch)
        try:
            check_tensors(tensors, self.hidden_size)
        except TrunkRefused as error:
            raise _naming(error, member.slot) from None
        if mode is ForwardMode.EVALUATE:
            lease = current.plan.window_seconds

            def evaluate() -> Tensor:
                self._caches.release(session, released)
                if cache is not None:
                    return self._caches.forward(session, cache, tensors, digest, lease, member.cuts)
                return self._compute.forward(
                    tensors, train=False, seed_of="", use_cache=use_cache, cuts=member.cuts
                )

            return self._worker.call(evaluate, deadline)
        if cache is not None:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, "only an evaluation may keep a key-value cache."
            )
        name = current.name_of(member, key, CallKind.FORWARD)
        if mode is ForwardMode.NO_GRAD:
            seed_of = seed_name(current, name)
            result = self._worker.call(
                lambda: self._compute.forward(
                    tensors,
                    train=True,
                    seed_of=seed_of,
                    use_cache=use_cache,
                    cuts=member.cuts,
                ),
                deadline,
            )
            with self._changed:
                current.windows.slots[member.slot].contributions += 1
            return result
        if self.mode == "forward-only":
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                'the trunk runs in mode "forward-only" and keeps nothing for a backward.',
            )
        with self._changed:
            self._waiting.before_forward(current, name, version, deadline)
        return self._once(
            current,
            name,
            digest,
            lambda: self._contributions.forward_train(
                current, name, tensors, acknowledged, use_cache
            ),
            deadline,
            arrived,
        )

    def backward(
        self,
        session: str,
        epoch: int,
        key: ContributionKey,
        version: int,
        grad: Tensor,
        num_tokens: float,
        loss_denominator: float,
        last: bool,
        digest: bytes,
        deadline: float,
    ) -> CallResult:
        """``smashed_grad`` of one micro-batch; its parameter gradients join the open window.

        Safe to retry with the same key and content: the gradient counts once.

        Args:
            session: From :meth:`open_session`.
            epoch: From :meth:`open_session`.
            key: That of the forward.
            version: That of the forward's reply.
            grad: Gradient of the client's loss by ``trunk_output``.
            num_tokens: Label tokens of the micro-batch.
            loss_denominator: What the client divided its summed token loss by.
            last: Whether the slot sends no further micro-batch in this window.
            digest: Of the request's content.
            deadline: When to give up waiting.

        Raises:
            TrunkRefused: With its reason; nothing was accumulated.
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first; the call may yet take effect, so retry it.
        """
        with self._changed:
            current, member = self._keeper.member(session, epoch)
        name = current.name_of(member, key, CallKind.BACKWARD)

        def run() -> Tensor:
            return self._contributions.backward(
                current, name, version, grad, num_tokens, loss_denominator, last
            )

        return self._once(current, name, digest, run, deadline, self._clock())

    def wait_version(self, session: str, epoch: int, version: int, deadline: float) -> int:
        """Wait until the weights have ``version``, and return the version they have.

        Raises:
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        with self._changed:
            current, _ = self._keeper.member(session, epoch)
            self._waiting.until(
                current,
                lambda: self._compute.version >= version,
                deadline,
                lambda: f"version {version} of the trunk's weights",
            )
            return self._compute.version

    def close_session(self, session: str, epoch: int) -> None:
        """A client leaves. Idempotent; leaving before all planned steps gives its place up."""
        with self._changed:
            current = self._keeper.round_of_session(session)
            if current is None or epoch != self.epoch:
                return
            member = current.sessions[session]
            current.closed.add(session)
            if current.plan.evaluate or self.mode != "joint":
                current.windows.slots[member.slot].finished = True
                return
            if current.windows.slots[member.slot].finished:
                return
        self._worker.do(
            lambda: self._keeper.drop(current, member.slot, "it closed its session early")
        )

    def cache_bytes(self) -> int:
        """Bytes of key-value caches, after freeing those of closed sessions and ended leases."""

        def run() -> int:
            self._caches.expire(self._is_open)
            return self._caches.num_bytes

        return self._worker.do(run)

    def count_bytes(self, session: str, received: int, sent: int) -> None:
        """Add a call's bytes on the wire to its slot's totals."""
        with self._changed:
            current = self._keeper.round_of_session(session)
            if current is not None:
                slot = current.sessions[session].slot
                current.received[slot] = current.received.get(slot, 0) + received
                current.sent[slot] = current.sent.get(slot, 0) + sent

    # ------------------------------------------------------------------ the coordinator

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        """Open a round, and return this process's epoch and the weights' version.

        The round begins with the weights that ``plan.base`` names: if those were prepared, they are
        committed; if this process does not have them, they are restored from their checkpoint. A new
        experiment starts from the trunk's initial weights. A new attempt of a round gives the former
        attempt up. Safe to retry. An asynchronous round is begun again and again while it is open,
        each time with everybody who is at work.

        Raises:
            TrunkRefused: Another experiment's round is in progress, the plan is empty, or the base's
                checkpoint is missing or damaged (NO_CHECKPOINT).
        """
        if not plan.participants and plan.step_every is not StepEvery.BUFFER:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, "a round needs at least one participant."
            )
        return self._worker.do(lambda: self._keeper.begin(plan))

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        deadline: float,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """No more contributions will come: finish the last window and report. Safe to retry.

        Args:
            experiment: Of the round.
            server_round: Of the round.
            attempt: Of the round.
            deadline: When to give up waiting.
            arrivals: Of an asynchronous round: whose work makes its step.

        Raises:
            RoundAborted: The round was given up, or has no quorum without the unfinished clients.
            TrunkRefused: That round is not open.
            TrunkUnavailable: The deadline passed first; the call may yet take effect, so retry it.
        """
        prepared = self._worker.submit(
            self._keeper.prepare, experiment, server_round, attempt, arrivals
        )
        return self._worker.result(prepared, deadline)

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        """Keep what the round did; return the weights' version. Safe to retry.

        Raises:
            RoundAborted: The round was given up.
            TrunkRefused: That round is not open, or was not prepared.
        """
        return self._worker.do(lambda: self._keeper.commit(experiment, server_round, attempt))

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Give the round up and roll the weights back to its beginning. Safe to retry.

        Raises:
            TrunkRefused: That round is not open.
        """

        def run() -> int:
            with self._changed:
                current = self._keeper.named_round(experiment, server_round, attempt)
                if not current.committed:
                    current.windows.abort(why)
            self._keeper.settle(current)
            return self._compute.version

        return self._worker.do(run)

    def status(self) -> TrunkStatus:
        """Where the trunk stands. Never waits for a forward or a backward."""
        with self._changed:
            base = TrunkStatus(
                epoch=self.epoch,
                version=self._compute.version,
                experiment=self._keeper.weights.experiment,
                fingerprint=self.fingerprint,
            )
            current = self._keeper.round
            if current is None:
                return base
            slots = self._keeper.slot_reports(current)
            phase = "idle" if current.committed else current.windows.phase.value
            return replace(
                base,
                server_round=current.plan.server_round,
                attempt=current.plan.attempt,
                phase="prepared" if current.report and phase == "done" else phase,
                window=current.windows.window,
                num_tokens=sum(slot.num_tokens for slot in slots),
                bytes_received=sum(current.received.values()),
                bytes_sent=sum(current.sent.values()),
                slots=slots,
                problem=current.windows.problem,
                activations=self._keeper.activation_report(current),
            )

    def adapter(self) -> dict[str, Tensor]:
        """The trainable parameters as fp32 copies on the CPU, by the unsplit model's names."""
        return self._worker.do(self._compute.adapter)

    def close(self) -> None:
        """End the engine's threads; whoever waits is told that the round is over."""
        with self._changed:
            if self._keeper.round is not None and not self._keeper.round.committed:
                self._keeper.round.windows.abort("the trunk is shutting down")
            for flight in self._keeper.flights.all():
                flight.windows.abort("the trunk is shutting down")
            self._changed.notify_all()
        self._watchdog.close()
        self._worker.close()

    # ------------------------------------------------------------------ running

    def _once(
        self,
        current: Round,
        name: CallName,
        digest: bytes,
        run: Callable[[], Tensor],
        deadline: float,
        arrived: float,
    ) -> CallResult:
        """Run a call that must have one effect, or wait for the reply of its first arrival."""
        with self._changed:
            self._keeper.require_open(current)
            future, mine = current.ledger.claim(name, digest)
        if mine:
            self._worker.submit(self._run_once, current, name, digest, future, run, arrived)
        return self._worker.result(future, deadline)

    def _run_once(
        self,
        current: Round,
        name: CallName,
        digest: bytes,
        future: Future[CallResult],
        run: Callable[[], Tensor],
        arrived: float,
    ) -> None:
        try:
            result = self._worker.timed(run, arrived)
            if isinstance(current, Flight):
                result = replace(result, version=current.version)
            current.compute_seconds += result.compute_seconds
        except BaseException as error:
            with self._changed:
                current.ledger.forget(name)
            future.set_exception(_naming(error, name.slot))
            return
        if name.kind is CallKind.FORWARD:
            failpoints.reach("trunk.forward.computed")
            future.set_result(result)
            return
        current.ledger_hash ^= contribution_hash(name, digest)
        failpoints.reach("trunk.backward.accumulated")
        future.set_result(result)
        self._keeper.settle(current)

    def _free_caches(self) -> None:
        if not self._caches.is_empty:
            self.cache_bytes()

    def _is_open(self, session: str) -> bool:
        with self._changed:
            current = self._keeper.round
            return (
                current is not None
                and not current.over
                and session in current.sessions
                and session not in current.closed
            )


def _naming(error: BaseException, slot: int) -> BaseException:
    """A refusal of NaN or Inf says whose tensor it was."""
    if isinstance(error, TrunkRefused) and error.reason is RefusalReason.NON_FINITE:
        return TrunkRefused(error.reason, f"slot {slot}: {error}")
    return error
