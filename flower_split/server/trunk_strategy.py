"""The strategy: one trunk round around every phase of an inner Flower strategy, by composition.

``configure_train`` opens the trunk's round and hands every client, in its own message only, the
trunk's address and a token of that round. ``aggregate_train`` closes it in two phases: the trunk
prepares and says which clients' contributions are in; the inner strategy aggregates exactly those
clients' adapters; the trunk commits. Whatever fails in between aborts the round, and the trunk
returns to its weights of the round's beginning.

The inner strategy may be any of Flower's, also inside one of its wrappers for differential privacy.
It sees a grid that holds only the clients chosen for the phase (seeded, over slots), and replies in
slot order, so that its sums are repeatable. What it carries from round to round is kept with the
round, and taken back where a round is lost (``flower_split/server/inner/state.py``).

This is the last of the seven files that a training step passes through.
"""

import logging
import math
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

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
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, RoundBase, RoundPlan, RoundReport, TrunkStatus
from flower_split.runtime import failpoints
from flower_split.server.federation.exchange import Federation, by_slot, describe, lost_slots
from flower_split.server.federation.handshake import num_participants
from flower_split.server.federation.replies import (
    check_values,
    completed,
    excluded_by,
    scalars,
    with_uniform_weight,
    without_steps,
)
from flower_split.server.inner.reply_checks import check_for_inner, checked_result, weighs_uniformly
from flower_split.server.inner.state import begin_again, load_state, state_of
from flower_split.server.node_view import NodeView
from flower_split.server.privacy.mechanisms import check_wrapped

logger = logging.getLogger(__name__)


class Coordinator(Protocol):
    """What the strategy asks of the trunk; :class:`flower_split.server.coordinator.TrunkCoordinator`."""

    def begin_round(self, plan: RoundPlan) -> tuple[int, int]:
        """Open a round for its participants; returns ``(epoch, version)``."""

    def prepare_round(
        self,
        experiment: str,
        server_round: int,
        attempt: int,
        arrivals: Sequence[Arrival] = (),
    ) -> RoundReport:
        """First phase of the commit: who completed what, or whose work an asynchronous round takes."""

    def commit_round(self, experiment: str, server_round: int, attempt: int) -> int:
        """Second phase: the round's steps stay."""

    def abort_round(self, experiment: str, server_round: int, attempt: int, why: str) -> int:
        """Roll back to the round's beginning; also ends an evaluation."""

    def status(self) -> TrunkStatus:
        """Where the trunk stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkAccess:
    """How clients reach the trunk."""

    address: str  # host:port as the clients see it
    root_certificates: str = ""  # PEM text of the CA for TLS; empty: plain text on loopback


@dataclass(slots=True)
class _Phase:
    """The phase that is open: what was sent to whom."""

    server_round: int
    evaluate: bool
    messages: list[Message]
    slots: list[int]
    cause: str = ""  # why the phase was ended before its clients were done
    lost: set[int] = field(default_factory=set)  # slots whose process or connection was lost
    trunk_lost: bool = False


StepsSink = Callable[[int, int, Mapping[str, list[float]], Mapping[str, float]], None]
"""Receives ``(server_round, slot, per-step lists, metrics)`` of every accepted training reply."""

CommitSink = Callable[[int, RoundReport, ArrayRecord], None]
"""Receives ``(server_round, the trunk's report, the new adapter)`` of a round and makes it last: when
it returns, the round is committed, and the trunk follows."""

EvaluationSink = Callable[[int, int, Mapping[str, float]], None]
"""Receives ``(server_round, slot, metrics)`` of every evaluation reply."""


class TrunkStrategy(Strategy):
    """Coordinate the trunk around ``inner``.

    Args:
        inner: Any Flower strategy whose clients return full adapter weights, or one of Flower's
            wrappers for differential privacy around it. Its own sampling must not ask for more
            nodes than take part in a phase. A wrapper belongs inside: what is committed must be
            what was noised.
        coordinator: The trunk's round control.
        federation: The run's nodes, from the handshake.
        config: The run's configuration.
        access: How clients reach the trunk.
        experiment: Name of the run on the trunk; stays when a run is resumed.
        steps_per_round: Optimizer steps of the client that takes the most.
        attempt: Of the next phase; every new try counts on.
        base: The committed round that the next one begins with; None: whatever the trunk has.
        on_commit: The commit point of a round; None: the trunk's commit is.
        on_steps: Receives the step metrics of accepted replies.
        on_evaluation: Receives the metrics of evaluation replies.

    Attributes:
        largest_weights: Slot to the largest weight that this client can report truthfully, where
            Flower's strategies weigh clients by what they say; one above is refused.

    Raises:
        ConfigError: The inner strategy would lose the noise of the wrapper around it.
    """

    def __init__(
        self,
        inner: Strategy,
        coordinator: Coordinator,
        federation: Federation,
        config: RunConfig,
        *,
        access: TrunkAccess,
        experiment: str,
        steps_per_round: int,
        attempt: int = 0,
        base: RoundBase | None = None,
        on_commit: CommitSink | None = None,
        on_steps: StepsSink | None = None,
        on_evaluation: EvaluationSink | None = None,
    ) -> None:
        check_wrapped(inner)
        self.inner = inner
        self.coordinator = coordinator
        self.federation = federation
        self.config = config
        self.access = access
        self.experiment = experiment
        self.steps_per_round = steps_per_round
        self.attempt = attempt
        self.base = base
        self.epoch = 0  # of the trunk process that the open phase runs on
        self._on_commit = on_commit
        self.last_report: RoundReport | None = None
        self.largest_weights: Mapping[int, float] = {}
        self._on_steps = on_steps
        self._on_evaluation = on_evaluation
        self._phase: _Phase | None = None

    def summary(self) -> None:
        """Log the inner strategy's summary."""
        self.inner.summary()

    # ------------------------------------------------------------------ train

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the inner strategy write the messages, open the trunk's round, hand out tokens.

        Raises:
            TrunkError: The trunk does not answer, or refuses the round.
        """
        view = self._view(grid, server_round, self.config.fraction_train, "train")
        begin_again(self.inner, server_round)
        inner = self.inner.configure_train(server_round, arrays, config, view)
        return self._open(server_round, list(inner), evaluate=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Prepare the trunk, aggregate the clients that completed, commit.

        Raises:
            FederationError: Too few clients completed the round, or their weights cannot be
                aggregated. The trunk's round is aborted.
        """
        phase = self._current(server_round, evaluate=False)
        replies = list(replies)
        phase.lost = lost_slots(self.federation, phase.messages, replies)
        before = state_of(self.inner)
        try:
            good, problems = by_slot(self.federation, phase.messages, replies)
            self._require(good, problems, server_round)
            report = self._prepare(server_round, problems)
            kept, problems = completed(good, problems, report)
            self._require(kept, problems, server_round)
            check_values(kept, self.federation, server_round, self.inner)
            check_for_inner(
                self.inner,
                kept,
                dict(zip(phase.slots, phase.messages, strict=True)),
                self.federation,
                server_round,
                self._weights_to_check(),
            )
            failpoints.reach("server.aggregate.before")
            contents = {slot: self._for_inner(server_round, slot, kept[slot]) for slot in kept}
            arrays, metrics = self._aggregate(server_round, list(contents.values()))
            if arrays is None or len(arrays) == 0:
                raise FederationError(
                    f"round {server_round}: the inner strategy "
                    f"{type(self.inner).__name__} returned no adapter from {len(kept)} replies; "
                    "see its messages in the log."
                )
            arrays = checked_result(self.inner, arrays, server_round)
            problems |= excluded_by(self.inner)  # the quorum is about the trunk's windows
            self.commit(server_round, report, arrays)
        except BaseException as error:
            self.give_up(f"the ServerApp could not finish the round: {error}")
            load_state(self.inner, before)
            raise
        if problems:
            logger.warning(
                "round=%d went on without %s", server_round, describe(problems, self.federation)
            )
        self._phase = None
        self.last_report = report
        return arrays, metrics

    def commit(self, server_round: int, report: RoundReport, arrays: ArrayRecord) -> None:
        """Make the round last; after the commit point nothing undoes it, and nothing is raised."""
        if self._on_commit is None:
            self.coordinator.commit_round(self.experiment, server_round, self.attempt)
            return
        self._on_commit(server_round, report, arrays)
        self.base = RoundBase(server_round, report.digest)
        try:
            self.coordinator.commit_round(self.experiment, server_round, self.attempt)
        except TrunkError as error:  # the next phase names the round as its base, which commits it
            logger.warning("round=%d the trunk will commit later: %s", server_round, error)
        failpoints.reach("server.commit.after")

    # --------------------------------------------------------------- evaluate

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As :meth:`configure_train`, for a round whose sessions only evaluate."""
        if self.config.fraction_evaluate == 0:
            return []
        view = self._view(grid, server_round, self.config.fraction_evaluate, "evaluate")
        inner = self.inner.configure_evaluate(server_round, arrays, config, view)
        return self._open(server_round, list(inner), evaluate=True)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Close the trunk's evaluation and let the inner strategy aggregate the metrics.

        Raises:
            FederationError: Every client failed.
        """
        if self._phase is None:
            return None
        phase = self._current(server_round, evaluate=True)
        replies = list(replies)
        lost = phase.trunk_lost or lost_slots(self.federation, phase.messages, replies)
        good, problems = by_slot(self.federation, phase.messages, replies)
        self.give_up("the evaluation ended")
        if not good:
            kind = RoundLost if lost is True or lost >= set(problems) else FederationError
            raise kind(
                f"round {server_round}: no client could evaluate. "
                f"{describe(problems, self.federation)}"
            )
        if problems:
            logger.warning(
                "round=%d evaluation without %s", server_round, describe(problems, self.federation)
            )
        for slot, reply in good.items():
            if self._on_evaluation is not None:
                self._on_evaluation(server_round, slot, scalars(reply.content))
            if weighs_uniformly(self.inner):
                reply.content = with_uniform_weight(reply.content)
        return self.inner.aggregate_evaluate(server_round, list(good.values()))

    # ---------------------------------------------------------------- shared

    @property
    def participants(self) -> list[int]:
        """The slots of the phase that is open, ascending."""
        return [] if self._phase is None else list(self._phase.slots)

    @property
    def evaluating(self) -> bool:
        """Whether the phase that is open only evaluates."""
        return self._phase is not None and self._phase.evaluate

    @property
    def required(self) -> int:
        """How many clients of the open phase must complete; one is enough to evaluate."""
        if self.evaluating:
            return 1
        total = len(self.participants)
        return max(1, math.ceil(total * self.config.trunk.quorum_of(max(total, 1)) - 1e-9))

    def failures(self, replies: Iterable[Message]) -> dict[int, str]:
        """Reasons of the failed replies among ``replies``, by slot (absent ones do not count)."""
        if self._phase is None:
            return {}
        arrived = list(replies)
        answered = {reply.metadata.reply_to_message_id for reply in arrived}
        sent = [m for m in self._phase.messages if m.metadata.message_id in answered]
        return by_slot(self.federation, sent, arrived)[1]

    def give_up(self, why: str) -> None:
        """Abort the trunk's open phase, if there is one; never raises a trunk error."""
        phase, self._phase = self._phase, None
        if phase is None:
            return
        try:
            self.coordinator.abort_round(self.experiment, phase.server_round, self.attempt, why)
        except TrunkError as error:
            logger.warning("round=%d the trunk could not abort: %s", phase.server_round, error)

    def lose_phase(self, why: str) -> None:
        """The trunk that the open phase runs on is gone: who has not completed has lost it."""
        if self._phase is not None:
            self._phase.cause = self._phase.cause or why
            self._phase.trunk_lost = True

    def settle_trunk(self, server_round: int) -> int:
        """Have the trunk stand at the committed round, whatever happened to it since.

        Returns:
            The epoch of the trunk process that stands there; another one does not.

        Raises:
            TrunkUnavailable: It does not answer, or restarted meanwhile.
            TrunkRefused: It cannot restore the round.
        """
        if self.base is None:
            return self.coordinator.status().epoch
        plan = RoundPlan(
            experiment=self.experiment,
            server_round=server_round,
            attempt=self.attempt + 1,
            participants={0: secrets.token_urlsafe(32)},
            evaluate=True,
            base=self.base,
        )
        epoch, _ = self.coordinator.begin_round(plan)
        try:
            self.coordinator.abort_round(self.experiment, server_round, plan.attempt, "it stands")
        except TrunkRefused as error:  # a new process does not know the round that was just begun
            raise TrunkUnavailable(
                f"the trunk restarted while it was brought to round {self.base.server_round}: {error}"
            ) from error
        return epoch

    def stop_phase(self, why: str) -> None:
        """Abort the trunk's round so that its clients end at once; the phase stays to be judged."""
        if self._phase is not None:
            self._phase.cause = self._phase.cause or why
            try:
                self.coordinator.abort_round(
                    self.experiment, self._phase.server_round, self.attempt, why
                )
            except TrunkError as error:
                logger.warning("the trunk could not abort: %s", error)

    def _view(self, grid: Grid, server_round: int, fraction: float, phase: str) -> NodeView:
        """The grid with only the nodes chosen for this phase, in slot order.

        Everybody evaluates before the first and after the last round, so that the two compare.
        """
        slots = self.federation.slots
        whole = phase == "evaluate" and server_round in (0, self.config.num_server_rounds)
        count = len(slots) if whole else num_participants(len(slots), fraction)
        if count < len(slots):
            generator = random.Random(f"{self.config.seed}/{server_round}/{phase}")
            slots = sorted(generator.sample(slots, count))
        return NodeView(grid, [self.federation.nodes[slot] for slot in slots])

    def _open(self, server_round: int, inner: list[Message], *, evaluate: bool) -> list[Message]:
        """Open the trunk's round for the clients the inner strategy wrote to."""
        if not inner:
            raise FederationError(
                f"round {server_round}: the inner strategy {type(self.inner).__name__} chose no "
                "client. Its fraction-train and fraction-evaluate must be above 0; set the run "
                "config's instead."
            )
        chosen = {self.federation.slot_of(m.metadata.dst_node_id): m for m in inner}
        tokens = {slot: secrets.token_urlsafe(32) for slot in sorted(chosen)}
        trunk = self.config.trunk
        self.epoch, _ = self.coordinator.begin_round(
            RoundPlan(
                experiment=self.experiment,
                server_round=server_round,
                attempt=self.attempt,
                participants=tokens,
                step_every=StepEvery(trunk.step_every),
                steps_per_round=self.steps_per_round,
                num_server_rounds=self.config.num_server_rounds,
                quorum=trunk.quorum_of(len(chosen)),
                join_seconds=trunk.join_timeout,
                window_seconds=trunk.window_timeout,
                evaluate=evaluate,
                base=self.base,
            )
        )
        messages = [
            self.addressed(chosen[slot], tokens[slot], server_round) for slot in sorted(chosen)
        ]
        self._phase = _Phase(server_round, evaluate, messages, sorted(chosen))
        return messages

    def addressed(self, message: Message, token: str, server_round: int) -> Message:
        """A copy of ``message`` that carries how its one receiver reaches the trunk.

        The inner strategy's messages share one ConfigRecord, which Flower logs; a token goes into a
        copy only.
        """
        content = RecordDict(dict(message.content.items()))
        names = list(content.config_records) or ["config"]
        content[names[0]] = ConfigRecord(
            {
                **dict(content.config_records.get(names[0], ConfigRecord()).items()),
                "server-round": server_round,
                "attempt": self.attempt,
                "experiment": self.experiment,
                "trunk-address": self.access.address,
                "trunk-root-certificates": self.access.root_certificates,
                "trunk-token": token,
            }
        )
        return Message(
            content,
            message.metadata.dst_node_id,
            message.metadata.message_type,
            ttl=message.metadata.ttl,
            group_id=message.metadata.group_id or str(server_round),
        )

    def _current(self, server_round: int, *, evaluate: bool) -> _Phase:
        phase = self._phase
        if phase is None or (phase.server_round, phase.evaluate) != (server_round, evaluate):
            raise FederationError(
                f"round {server_round}: aggregate was called without its configure; call the "
                "strategy's hooks in order."
            )
        return phase

    def _prepare(self, server_round: int, problems: Mapping[int, str]) -> RoundReport:
        try:
            return self.coordinator.prepare_round(self.experiment, server_round, self.attempt)
        except FlowerSplitError as error:
            why = f" Clients: {describe(problems, self.federation)}." if problems else ""
            lost = isinstance(error, TrunkUnavailable) or (
                isinstance(error, TrunkRefused) and error.reason is RefusalReason.WRONG_ATTEMPT
            )
            raise (RoundLost if lost else FederationError)(
                f"round {server_round}: the trunk cannot close the round: {error}{why}"
            ) from error

    def _require(
        self, good: Mapping[int, Message], problems: Mapping[int, str], server_round: int
    ) -> None:
        """Raise unless enough clients completed."""
        if len(good) >= self.required:
            return
        total, required = len(self.participants), self.required
        lower = " Or lower trunk.quorum to go on without them." if required > 1 else ""
        cause = self._phase.cause if self._phase is not None else ""
        why = cause or describe(problems, self.federation)
        phase = self._phase
        lost = phase is not None and (phase.trunk_lost or phase.lost >= set(problems))
        raise (RoundLost if lost else FederationError)(
            f"round {server_round}: {len(good)} of {total} clients completed, and the quorum "
            f"(trunk.quorum, trunk.quorum-count) needs {required}. Cause: {why.rstrip('.')}. "
            f"Mend it and start the run again.{lower}"
        )

    def _aggregate(
        self, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the replies; Flower's own errors in this package's."""
        try:
            return self.inner.aggregate_train(server_round, replies)
        except AppExitException as error:
            raise FederationError(
                f"round {server_round}: the inner strategy {type(self.inner).__name__} cannot "
                f"aggregate {len(replies)} replies: {error}"
            ) from error

    def _weights_to_check(self) -> dict[str, Mapping[int, float]]:
        by_examples = self.config.strategy.weighting == "examples"
        return {"num-examples" if by_examples else "num-tokens": self.largest_weights}

    def _for_inner(self, server_round: int, slot: int, reply: Message) -> Message:
        """The reply as Flower's strategies expect it; its step metrics go to the sink."""
        content, steps = without_steps(reply.content)
        if steps and self._on_steps is not None:
            self._on_steps(server_round, slot, steps, scalars(reply.content))
        reply.content = with_uniform_weight(content) if weighs_uniformly(self.inner) else content
        return reply
