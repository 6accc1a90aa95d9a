"""The trunk's round and dispatches, the lock that guards them, and which one a call is of.

Lock discipline, for the whole engine:

- ``changed`` is the one lock. It guards rounds with all they hold (windows, ledgers, sessions,
  activations), dispatches, and this index. It is re-entrant, and notified at every transition.
- Weights, optimizer, gradients and key-value caches belong to the compute thread. It takes
  ``changed`` inside what it runs; nobody waits for it while holding ``changed``.
- A thread that holds ``changed`` takes no other lock, and lets go of it while it waits.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from flower_split.errors import RefusalReason, TrunkRefused, TrunkUnavailable
from flower_split.trunk.compute.activations import ActivationCache
from flower_split.trunk.compute.weight_versions import Versions
from flower_split.trunk.engine.dispatches import Dispatches
from flower_split.trunk.engine.round_state import Round, hashed
from flower_split.trunk.engine.sessions import Session
from flower_split.trunk.engine.watching import Totals


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the engine keeps, to look at."""

    deadline: float  # when the open window expires, on the engine's clock
    num_replies: int  # that the ledger keeps
    activations: ActivationCache | None  # of the round begun last; None: none was
    weight_versions: Versions  # copies for dispatches


class RoundIndex:
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

    def __init__(self, dispatches: Dispatches, epoch: int, clock: Callable[[], float]) -> None:
        self.changed = threading.Condition()
        self._counting = threading.Lock()  # of bytes; taken last
        self.dispatches = dispatches
        self.epoch = epoch
        self.clock = clock
        self.round: Round | None = None
        self.totals = Totals()
        self.revoked: frozenset[int] = frozenset()
        self._heard = clock()  # from the coordinator

    def replace(self, current: Round) -> None:
        """Make ``current`` the trunk's round; calls of the former one are refused from now on."""
        if self.round is not None:
            self.round.retired = True
            self.totals.compute_seconds += self.round.compute_seconds
        self.round = current
        self.changed.notify_all()

    def open_round(self) -> Round:
        """Return the round that is open for calls.

        Raises:
            TrunkRefused: There is none (NO_ROUND).
            RoundAborted: It was given up.
        """
        current = self._begun()
        current.require_open()
        return current

    def named_round(self, experiment: str, server_round: int, attempt: int) -> Round:
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

    def member(self, session: str, epoch: int) -> tuple[Round, Session]:
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

    def touch(self, current: Round, slot: int) -> None:
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

    def of_token(self, token: str) -> Round:
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

    def of_session(self, session: str) -> Round | None:
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

    def hear_coordinator(self) -> None:
        """Note a word of the coordinator's."""
        self._heard = self.clock()

    @property
    def coordinator_deadline(self) -> float:
        """When the open round ends for want of its coordinator; a prepared one waits for ever."""
        current = self.round
        if current is None or current.over or current.report is not None:
            return math.inf
        seconds = current.plan.coordinator_seconds
        return self._heard + seconds if seconds > 0 else math.inf

    @property
    def deadline(self) -> float:
        """When something ends next in the open round; infinite where nothing is awaited."""
        current = self.round
        if current is None or current.over:
            return math.inf
        return min(current.windows.deadline, self.coordinator_deadline)

    def has_silent(self) -> bool:
        """Return whether the lease of a client at work has ended."""
        current = self.round
        return current is not None and bool(
            current.silent(self.clock()) or self.dispatches.silent()
        )

    def inspect(self) -> Inspection:
        """Return what is kept for the round begun last, and for dispatches."""
        current = self.round
        return Inspection(
            self.deadline,
            0 if current is None else len(current.ledger) + len(current.step_ends),
            None if current is None else current.activations,
            self.dispatches.versions,
        )

    def wait(
        self,
        current: Round,
        reached: Callable[[float], bool],
        deadline: float,
        what: Callable[[], str],
    ) -> None:
        """Wait until ``reached``; the lock is free meanwhile.

        Args:
            current: The call's round.
            reached: Asked after every change, and once a second; given the time.
            deadline: When to give up.
            what: Says what is waited for.

        Raises:
            RoundAborted: The round was given up.
            TrunkUnavailable: The deadline passed first.
        """
        while True:
            current.require_open()
            if reached(self.clock()):
                return
            self.pause(deadline, what)

    def pause(self, deadline: float, what: Callable[[], str]) -> None:
        """Wait for the next change, or a second; the lock is free meanwhile.

        Args:
            deadline: When to give up.
            what: Says what is waited for.

        Raises:
            TrunkUnavailable: The deadline has passed.
        """
        left = deadline - self.clock()
        if left <= 0:
            raise TrunkUnavailable(f"the deadline passed while waiting for {what()}.")
        self.changed.wait(min(left, 1.0))

    def _begun(self) -> Round:
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

    def _dispatch_of(self, session: str) -> Round | None:
        at_work = list(self.dispatches.at_work.values())  # a copy: see count_bytes
        return next((item for item in at_work if session in item.sessions), None)
