"""Which round or dispatch a call is of, what it may do there, and the lock that guards them.

Lock discipline, for the whole engine:

- ``changed`` is the one lock. It guards rounds with all they hold (windows, ledgers, sessions,
  activations), dispatches, and this index. It is re-entrant, and notified at every
  transition, but not of a contribution that ends no window.
- Weights, optimizer, gradients and key-value caches belong to the compute thread. It takes
  ``changed`` inside what it runs; nobody waits for it while holding ``changed``.
- A thread that holds ``changed`` takes no other lock, and lets go of it while it waits.
"""

import hashlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import CallResult, ContributionKey, RoundPlan
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.weight_versions import Weights
from flower_split.trunk.engine.ledger import CallKind, CallName, Ledger
from flower_split.trunk.engine.phases import Phase
from flower_split.trunk.engine.round_waits import RoundWaits
from flower_split.trunk.engine.sessions import Session
from flower_split.trunk.engine.watching import Totals
from flower_split.trunk.engine.windows import WindowMachine

if TYPE_CHECKING:  # a round is one of these
    from flower_split.trunk.engine.dispatches import Dispatches
    from flower_split.trunk.engine.round_state import Round


class RoundCalls:
    """What a call asks of its round: whether it may run now, under which name, with which weights.

    :class:`~flower_split.trunk.engine.round_state.Round` has the state. The engine's lock is held around
    every method, but for those that say otherwise.
    """

    plan: RoundPlan
    compute: TrunkCompute
    trains: bool
    windows: WindowMachine
    activations: ActivationCache
    ledger: Ledger[CallResult]
    open_contribution: tuple[int, int, int] | None
    open_since: float
    last_activity: float
    last_seen: dict[int, float]
    retired: bool

    @property
    def version(self) -> int:
        """The version of the weights that its calls compute with. Needs no lock."""
        return self.compute.version

    @property
    def weights(self) -> Weights | None:
        """The copies that its calls compute with; None: the trunk's own weights."""
        return None

    def require_open(self) -> None:
        """Check that calls may still have an effect in this round.

        Raises:
            RoundAborted: It was given up.
            TrunkRefused: It is no longer the trunk's round (WRONG_ATTEMPT).
        """
        if self.windows.phase is Phase.ABORTED:
            raise RoundAborted(f"{self} was given up: {self.windows.problem}")
        if self.retired:
            raise TrunkRefused(RefusalReason.WRONG_ATTEMPT, f"{self} is no longer the open round.")

    def may_forward(self, name: CallName, version: int, now: float) -> bool:
        """Return whether a training forward may run now; if not, ask again after a change.

        Args:
            name: The forward.
            version: The version that the client expects.
            now: On the engine's clock.

        Raises:
            TrunkRefused: The weights have moved on (STALE_VERSION), or the slot is not in the window.
        """
        if name in self.ledger.calls:
            return True  # a retry: it gets the reply of the first arrival
        self.windows.check_planned(name.slot, name.window)
        if not self.trains:
            return True
        if self.windows.step_every is StepEvery.CONTRIBUTION:
            return self._take_turn(name, now)
        if self.compute.version < version:
            return False
        self.windows.check(name.slot, name.window)
        if version != self.compute.version:
            raise TrunkRefused(
                RefusalReason.STALE_VERSION,
                f"slot {name.slot} asks for version {version} of the weights; they are at "
                f"{self.compute.version}.",
            )
        return True

    def awaited(self, version: int) -> str:
        """Say what a forward at ``version`` waits for."""
        if self.windows.step_every is StepEvery.CONTRIBUTION:
            return "its turn (trunk.step-every contribution)"
        return f"version {version} of the trunk's weights; {self.windows.waiting_for()}"

    def after_contribution(self) -> None:
        """Free what nobody needs after a backward that counted."""

    def touch(self, slot: int, now: float) -> None:
        """Note a call of ``slot``, so that a client at work is told from one that has gone."""
        self.last_activity = self.last_seen[slot] = now

    def name_of(self, member: Session, key: ContributionKey | None, kind: CallKind) -> CallName:
        """Return a training call's name in the ledger; its slot is the session's, never the key's.

        Raises:
            TrunkRefused: There is no key, the round only evaluates, or the key is of another attempt.
        """
        plan = self.plan
        if plan.evaluate or key is None:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                "a training call needs a contribution key, and a session of a training round.",
            )
        if (key.experiment, key.server_round, key.attempt) != (
            plan.experiment,
            plan.server_round,
            plan.attempt,
        ):
            raise TrunkRefused(
                RefusalReason.WRONG_ATTEMPT,
                f"slot {member.slot} sends a contribution to round {key.server_round} (attempt "
                f"{key.attempt}); {self} is open.",
            )
        return CallName(member.slot, key.window, key.micro_batch, kind)

    def seed_name(self, name: CallName) -> str:
        """Name a micro-batch for its dropout seed: the same in every attempt and every run."""
        return f"{self.plan.server_round}/{name.window}/{name.slot}/{name.micro_batch}"

    def _take_turn(self, name: CallName, now: float) -> bool:
        mine = (name.slot, name.window, name.micro_batch)
        self.touch(name.slot, now)  # a client that waits for its turn is not silent
        if self.open_contribution not in (None, mine) and (
            now > self.open_since + self.plan.window_seconds
        ):
            assert self.open_contribution is not None
            self.activations.release(self.open_contribution)
            self.open_contribution = None
        if self.open_contribution not in (None, mine):
            return False
        self.open_contribution, self.open_since = mine, now
        return True


class RoundIndex(RoundWaits):
    """The open round and the dispatches at work. ``changed`` is held around every method but two.

    Args:
        dispatches: The clients at work in asynchronous rounds.
        epoch: Epoch of this process.
        clock: Monotonic seconds.

    Attributes:
        changed: The engine's lock; see the module's docstring.
        round: The round begun last; None: none was.
        totals: Counts since the process started.
        revoked: Slots that are out of the experiment; replaced, never changed, for it is read without
            the lock.
    """

    def __init__(self, dispatches: "Dispatches", epoch: int, clock: Callable[[], float]) -> None:
        self.changed = threading.Condition()
        self._counting = threading.Lock()  # of bytes; taken last
        self.dispatches = dispatches
        self.epoch = epoch
        self.clock = clock
        self.round: Round | None = None
        self.totals = Totals()
        self.revoked: frozenset[int] = frozenset()
        self._heard = clock()  # from the coordinator

    def replace(self, current: "Round") -> None:
        """Make ``current`` the trunk's round; calls of the former one are refused from now on."""
        if self.round is not None:
            self.round.retired = True
            self.totals.compute_seconds += self.round.compute_seconds
        self.round = current
        self.changed.notify_all()

    def open_round(self) -> "Round":
        """Return the round that is open for calls.

        Raises:
            TrunkRefused: There is none (NO_ROUND).
            RoundAborted: It was given up.
        """
        current = self._begun()
        current.require_open()
        return current

    def named_round(self, experiment: str, server_round: int, attempt: int) -> "Round":
        """Return the round that the coordinator names, which must be the last begun.

        Raises:
            TrunkRefused: It is another one (WRONG_ATTEMPT).
        """
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

    def member(self, session: str, epoch: int) -> "tuple[Round, Session]":
        """Return the open round and the client that ``session`` belongs to, and note its call.

        Raises:
            TrunkRefused: WRONG_EPOCH, NO_ROUND or UNKNOWN_SESSION.
            RoundAborted: The round was given up.
        """
        if epoch != self.epoch:
            raise TrunkRefused(
                RefusalReason.WRONG_EPOCH,
                "the trunk process has restarted since this session opened; the round begins again.",
            )
        current: Round = self._dispatch_of(session) or self._begun()
        current.require_open()
        member = current.sessions.get(session)
        if member is None:
            raise TrunkRefused(
                RefusalReason.UNKNOWN_SESSION, f"no such session in {current}; open one first."
            )
        now = self.clock()
        current.touch(member.slot, now)
        if self.round is not None:  # a dispatch's call keeps its asynchronous round alive, too
            self.round.last_activity = now
        return current, member

    def touch(self, current: "Round", slot: int) -> None:
        """Note a call of ``slot``; a dispatch's call keeps its asynchronous round alive, too."""
        now = self.clock()
        current.touch(slot, now)
        if self.round is not None:
            self.round.last_activity = now

    def knows_token(self, token: str) -> bool:
        """Return whether a token is of the round begun last or a dispatch, and not revoked. No lock."""
        current, key, out = self.round, hashed(token), self.revoked
        rounds: list[Round] = list(self.dispatches.at_work.values())  # a copy: others change it
        if current is not None:
            rounds.append(current)
        for one in rounds:
            slot = one.slots_by_token.get(key)
            if slot is not None and slot not in out:
                return True
        return False

    def count_bytes(self, session: str, received: int, sent: int) -> None:
        """Add a call's bytes on the wire to its slot's totals.

        Takes a lock of its own: the engine's is held while the optimizer steps, and the reply that
        completes a window must not wait for that.
        """
        current = self.of_session(session)
        with self._counting:
            self.totals.bytes_received += received
            self.totals.bytes_sent += sent
            if current is not None:
                slot = current.sessions[session].slot
                current.usage.received[slot] += received
                current.usage.sent[slot] += sent

    def of_token(self, token: str) -> "Round":
        """Return what a token opens a session of: its dispatch, or else the open round.

        Raises:
            TrunkRefused: There is none (NO_ROUND).
            RoundAborted: It was given up.
        """
        name = hashed(token)
        at_work = self.dispatches.at_work.values()
        dispatch = next((item for item in at_work if name in item.slots_by_token), None)
        current: Round = dispatch or self._begun()
        current.require_open()
        return current

    def of_session(self, session: str) -> "Round | None":
        """Return what a session belongs to, open or not; None: nothing that is still there."""
        current = self._dispatch_of(session) or self.round
        return current if current is not None and session in current.sessions else None

    def is_open(self, session: str) -> bool:
        """Return whether ``session`` is of the trunk's round and may still make calls."""
        current = self.round
        return (
            current is not None
            and not current.over
            and session in current.sessions
            and session not in current.closed
        )

    def _begun(self) -> "Round":
        """Return the round begun last, which may have been given up since.

        Raises:
            TrunkRefused: There is none, or it is committed (NO_ROUND).
        """
        if self.round is None or self.round.committed:
            raise TrunkRefused(
                RefusalReason.NO_ROUND,
                "no round is open on the trunk: the coordinator has not begun one, or it is over.",
            )
        return self.round

    def _dispatch_of(self, session: str) -> "Round | None":
        at_work = list(self.dispatches.at_work.values())  # a copy: see count_bytes
        return next((item for item in at_work if session in item.sessions), None)


def hashed(token: str) -> bytes:
    """Return a token's SHA-256, by which it is looked up: no comparison leaks its bytes."""
    return hashlib.sha256(token.encode()).digest()


def contribution_hash(name: CallName, digest: bytes) -> int:
    """Return a contribution as a number; see :attr:`Round.ledger_hash`."""
    text = f"{name.slot}/{name.window}/{name.micro_batch}/".encode() + digest
    return int.from_bytes(hashlib.sha256(text).digest(), "big")
