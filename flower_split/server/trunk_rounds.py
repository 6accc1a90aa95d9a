"""TrunkRounds: the run's rounds as the trunk knows them, and their two-phase commit.

A round on the trunk is named by ``(experiment, server_round, attempt)``. The experiment stays when a
run is resumed; the attempt counts every new try, over the whole experiment, so that calls of an
earlier try are refused. :class:`TrunkRounds` is the one owner of these names: both round loops and
the strategy hold it, and read them from it.

A round goes through ``begin`` → ``prepare`` → ``commit``, or ends in ``abort``. The commit point
lies between the two phases: when the commit sink returns, the round lasts, and a trunk that misses
its own commit is told by the next round's base.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from flower_split.config import RunConfig
from flower_split.errors import (
    FederationError,
    FlowerSplitError,
    RefusalReason,
    RoundLost,
    TrunkError,
    TrunkRefused,
    TrunkUnavailable,
)
from flower_split.messages.orders import PhaseOrder, TrunkOrder
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import (
    Arrival,
    Dispatch,
    RoundBase,
    RoundPlan,
    RoundReport,
    TrunkStatus,
)
from flower_split.runtime import failpoints
from flower_split.runtime.log_fields import PROCESS_FIELDS
from flower_split.server.heartbeat import LEASE_SECONDS
from flower_split.server.step_ends import finish_rule
from flower_split.server.trunk_access import Coordinator, TrunkAccess

logger = logging.getLogger(__name__)

CommitSink = Callable[[int, int, RoundReport, ArrayRecord], None]
"""Makes a round last; called with ``(server_round, attempt, the trunk's report, the new adapter)``.
When it returns, the round is committed, and the trunk follows; if it raises, it never was."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where an experiment stands when its rounds begin or go on."""

    experiment: str
    attempt: int = 0  # of the next round
    base: RoundBase | None = None  # the committed round to begin with; None: whatever the trunk has


def stand_at_base(coordinator: Coordinator, start: StartingPoint, server_round: int) -> int:
    """Have the trunk restore the weights that an experiment begins or goes on with.

    It is an evaluation that nobody joins, begun and ended at once, under an attempt of its own.

    Returns:
        The epoch of the trunk process that stands there; another one does not.

    Raises:
        TrunkUnavailable: The trunk does not answer, or restarted meanwhile.
        TrunkRefused: It is at work on another experiment, or cannot restore the round.
    """
    plan = RoundPlan(
        experiment=start.experiment,
        server_round=server_round,
        attempt=start.attempt + 1,
        participants={0: secrets.token_urlsafe(32)},
        evaluate=True,
        base=start.base,
    )
    epoch, _ = coordinator.begin_round(plan)
    try:
        coordinator.abort_round(
            start.experiment, server_round, plan.attempt, "it stands at the committed round"
        )
    except TrunkRefused as error:  # a new process does not know the round that was just begun
        raise TrunkUnavailable(
            f"the trunk restarted while it was brought to round {server_round}: {error}"
        ) from error
    return epoch


class TrunkRounds:
    """Begin, prepare, commit and abort the rounds of one experiment on one trunk.

    Not thread-safe: the ServerApp's one thread runs all rounds.

    Args:
        coordinator: The trunk's round control.
        access: How clients reach the trunk.
        config: The run's configuration.
        start: Experiment, attempt and base to begin with.
        steps_per_round: Optimizer steps of the client that takes the most.
        on_commit: Makes a round last; None: the trunk's own commit does.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        access: TrunkAccess,
        config: RunConfig,
        start: StartingPoint,
        *,
        steps_per_round: int,
        on_commit: CommitSink | None = None,
    ) -> None:
        self.steps_per_round = steps_per_round
        self._coordinator = coordinator
        self._access = access
        self._config = config
        self._experiment = start.experiment
        self._attempt = start.attempt
        self._base = start.base
        self._epoch = 0
        self._on_commit = on_commit
        self._open_round: int | None = None  # begun, and neither committed nor aborted

    @property
    def attempt(self) -> int:
        """Return the attempt of the next round; also how many tries this experiment has lost."""
        return self._attempt

    @property
    def epoch(self) -> int:
        """Return the epoch of the trunk process that the last round began on."""
        return self._epoch

    @property
    def base(self) -> RoundBase | None:
        """Return the committed round that the next one begins with."""
        return self._base

    def new_attempt(self) -> int:
        """Count a lost try; return the new attempt. Calls of the old one are refused from now on."""
        self._attempt += 1
        return self._attempt

    def begin(self, server_round: int, tokens: Mapping[int, str], *, evaluate: bool = False) -> int:
        """Open a round for its participants.

        Args:
            server_round: Number of the round, from 1; 0 for the evaluation before round 1.
            tokens: Partition to the token with which that client joins.
            evaluate: Its sessions only evaluate.

        Returns:
            The trunk's epoch.

        Raises:
            TrunkError: The trunk does not answer, or refuses the round.
        """
        trunk = self._config.trunk
        return self._begin(
            RoundPlan(
                experiment=self._experiment,
                server_round=server_round,
                attempt=self._attempt,
                participants=tokens,
                step_every=StepEvery(trunk.step_every),
                steps_per_round=self.steps_per_round,
                num_server_rounds=self._config.num_server_rounds,
                quorum=trunk.quorum_of(len(tokens)),
                join_seconds=trunk.join_timeout,
                window_seconds=trunk.window_timeout,
                # A trunk that this app started ends with it.
                coordinator_seconds=LEASE_SECONDS if trunk.address else 0.0,
                evaluate=evaluate,
                base=self._base,
                finish=None if evaluate else finish_rule(self._config),
            )
        )

    def begin_buffer(self, server_round: int, dispatches: Sequence[Dispatch]) -> int:
        """Open an asynchronous round, or name its dispatches anew.

        Args:
            server_round: Number of the round, from 1.
            dispatches: Everybody whose work counts or may yet count, in any order.

        Returns:
            The trunk's epoch.

        Raises:
            TrunkError: The trunk does not answer, or refuses the round.
        """
        trunk = self._config.trunk
        return self._begin(
            RoundPlan(
                experiment=self._experiment,
                server_round=server_round,
                attempt=self._attempt,
                participants={},
                step_every=StepEvery.BUFFER,
                num_server_rounds=self._config.num_server_rounds,
                join_seconds=trunk.join_timeout,
                window_seconds=trunk.window_timeout,
                base=self._base,
                dispatches=tuple(sorted(dispatches, key=lambda item: item.number)),
            )
        )

    def _begin(self, plan: RoundPlan) -> int:
        PROCESS_FIELDS.bind(
            experiment=plan.experiment, round=plan.server_round, attempt=plan.attempt
        )
        self._epoch, _ = self._coordinator.begin_round(plan)
        self._open_round = plan.server_round
        return self._epoch

    def addressed(self, message: Message, token: str, server_round: int) -> Message:
        """Return a copy of ``message`` that carries how its one receiver reaches the trunk.

        The inner strategy's messages share one ConfigRecord, which Flower logs; a token goes into a
        copy only.
        """
        trunk = TrunkOrder(
            address=self._access.address,
            token=token,
            root_certificates=self._access.root_certificates,
            server_round=server_round,
            attempt=self._attempt,
            experiment=self._experiment,
        )
        return Message(
            PhaseOrder(trunk=trunk).write(message.content),
            message.metadata.dst_node_id,
            message.metadata.message_type,
            ttl=message.metadata.ttl,
            group_id=message.metadata.group_id or str(server_round),
        )

    def prepare(
        self, server_round: int, arrivals: Sequence[Arrival] = (), *, clients: str = ""
    ) -> RoundReport:
        """Close the round to contributions: the commit's first phase.

        Args:
            server_round: The open round.
            arrivals: The arrivals of an asynchronous round: whose work makes its step.
            clients: What clients reported meanwhile, for the error.

        Returns:
            Who completed what.

        Raises:
            RoundLost: The trunk does not answer, or is a process that does not know the round.
            FederationError: It cannot close the round for another reason.
        """
        try:
            return self._coordinator.prepare_round(
                self._experiment, server_round, self._attempt, arrivals
            )
        except FlowerSplitError as error:
            lost = isinstance(error, TrunkUnavailable) or (
                isinstance(error, TrunkRefused)
                and (
                    error.reason is RefusalReason.WRONG_ATTEMPT
                    # The trunk that computed the arrivals' gradients is not the one that answers.
                    or (bool(arrivals) and error.reason is RefusalReason.UNKNOWN_CONTRIBUTION)
                )
            )
            why = f" Clients: {clients}." if clients else ""
            raise (RoundLost if lost else FederationError)(
                f"round {server_round}: the trunk cannot close the round: {error}{why}"
            ) from error

    def commit(self, server_round: int, report: RoundReport, arrays: ArrayRecord) -> None:
        """Make the round last; after the commit point nothing undoes it, and nothing is raised.

        Args:
            server_round: The prepared round.
            report: From :meth:`prepare`.
            arrays: The new global adapter.
        """
        if self._on_commit is None:
            self._coordinator.commit_round(self._experiment, server_round, self._attempt)
            self._open_round = None
            return
        self._on_commit(server_round, self._attempt, report, arrays)
        # From here on the round is committed. The next one names it as its base, so that a trunk
        # which misses the call below commits then.
        self._base = RoundBase(server_round, report.digest)
        self._open_round = None
        try:
            self._coordinator.commit_round(self._experiment, server_round, self._attempt)
        except TrunkError as error:
            logger.warning("round=%d the trunk will commit later: %s", server_round, error)
        failpoints.reach("server.commit.after")

    def abort(self, why: str) -> None:
        """Roll the open round back, or end its evaluation; raise no trunk error.

        Does nothing where no round is open. Where the trunk does not answer, the round stays open
        here, and the next call tries again.
        """
        server_round = self._open_round
        if server_round is None:
            return
        try:
            self._coordinator.abort_round(self._experiment, server_round, self._attempt, why)
        except TrunkError as error:
            logger.warning("round=%d the trunk could not abort: %s", server_round, error)
            if isinstance(error, TrunkUnavailable):
                return
        self._open_round = None

    def settle(self, server_round: int) -> int:
        """Bring the trunk to the committed round, whatever happened to it since.

        Args:
            server_round: The last round of the run.

        Returns:
            The epoch of the trunk process that stands there; another one does not.

        Raises:
            TrunkUnavailable: It does not answer, or restarted meanwhile.
            TrunkRefused: It cannot restore the round.
        """
        if self._base is None:
            return self.status().epoch
        here = StartingPoint(self._experiment, self._attempt, self._base)
        return stand_at_base(self._coordinator, here, server_round)

    def status(self) -> TrunkStatus:
        """Return where the trunk stands.

        Raises:
            TrunkError: It does not answer.
        """
        return self._coordinator.status()
