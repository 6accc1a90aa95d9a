"""What the coordinator asks of the engine: to begin, prepare, commit and abort rounds.

The calls wait for the compute thread, so that none of them meets a forward or backward half done.
"""

from collections.abc import Sequence

from flower_split.errors import RefusalReason, TrunkRefused
from flower_split.protocol.values import Arrival, RoundPlan, RoundReport
from flower_split.trunk.engine.compute_thread import ComputeThread
from flower_split.trunk.engine.round_index import RoundIndex
from flower_split.trunk.engine.round_lifecycle import RoundLifecycle


class CoordinatorSide:
    """The engine as the coordinator sees it; :class:`TrunkEngine` sets what it works with."""

    _index: RoundIndex
    _thread: ComputeThread
    _lifecycle: RoundLifecycle

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
        if not plan.participants and not plan.asynchronous:
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST, "a round needs at least one participant."
            )
        return self._thread.do(lambda: self._begin(plan))

    def _begin(self, plan: RoundPlan) -> tuple[int, int]:
        answer = self._lifecycle.begin(plan)
        if self._index.round is not None:
            self._lifecycle.revocations.apply(self._index.round)
        return answer

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        deadline: float,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """Finish the last window, for no more contributions will come, and report. Safe to retry.

        Args:
            experiment: Experiment of the round.
            server_round: Number of the round.
            attempt: Attempt at the round.
            deadline: When to give up waiting.
            arrivals: The arrivals of an asynchronous round: whose work makes its step.

        Raises:
            RoundAborted: The round was given up, or has no quorum without the unfinished clients.
            TrunkRefused: The round is not open.
            TrunkUnavailable: The deadline passed first; the call may yet take effect, so retry it.
        """
        prepared = self._thread.submit(
            self._lifecycle.prepare, experiment, server_round, attempt, arrivals
        )
        return self._thread.result(prepared, deadline)

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        """Keep what the round did; return the weights' version. Safe to retry.

        Raises:
            RoundAborted: The round was given up.
            TrunkRefused: The round is not open, or was not prepared.
        """
        return self._thread.do(lambda: self._lifecycle.commit(experiment, server_round, attempt))

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Give the round up and roll the weights back to its beginning. Safe to retry.

        Raises:
            TrunkRefused: The round is not open.
        """
        return self._thread.do(
            lambda: self._lifecycle.abort(experiment, server_round, attempt, why)
        )

    def revoke(self, slots: Sequence[int], tokens: Sequence[str] = ()) -> list[int]:
        """Take clients out of the experiment; return their slots. Safe to retry.

        Args:
            slots: By number.
            tokens: By a token of theirs; one that is nobody's counts for nothing.

        Raises:
            TrunkRefused: No round was begun, or it has no such participant; nothing has changed.
        """
        return self._thread.do(lambda: self._lifecycle.revocations.revoke(slots, tokens))

    def keep_alive(self) -> None:
        """Note that the coordinator lives; see ``RoundPlan.coordinator_seconds``. Waits for nothing."""
        with self._index.changed:
            self._index.hear_coordinator()
