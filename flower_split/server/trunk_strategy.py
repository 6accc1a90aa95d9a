"""The strategy: one trunk round around every phase of an inner Flower strategy, by composition.

``configure_train`` opens the trunk's round and hands every client, in its own message only, the
trunk's address and a token of that round. ``aggregate_train`` closes it in two phases: the trunk
prepares and says which clients' contributions are in; the inner strategy aggregates exactly those
clients' adapters; the trunk commits. Whatever fails in between aborts the round, and the trunk
returns to its weights of the round's beginning.

The inner strategy may be any of Flower's, also inside one of its wrappers for differential privacy.
It sees a grid that holds only the clients chosen for the phase (seeded, over partitions), and receives
replies in order of partitions, so that its sums are repeatable. What it carries from round to round is kept
with the round, and restored where a round is lost (``flower_split/server/inner/state.py``).

This is the last of the seven files that a training step passes through.
"""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_split.config import RunConfig
from flower_split.errors import FederationError, RoundLost
from flower_split.messages.replies import WEIGHT_METRICS, scalars, take_steps, with_uniform_weight
from flower_split.protocol.values import EVALUATION_ENDED, RoundReport
from flower_split.runtime import failpoints
from flower_split.server.federation.client_keys import ClientKeys
from flower_split.server.federation.handshake import num_participants
from flower_split.server.federation.nodes import Federation, describe
from flower_split.server.federation.replies import (
    check_values,
    completed,
    excluded_by,
)
from flower_split.server.inner.outlier_check import check_moves
from flower_split.server.inner.reply_checks import check_for_inner, checked_result, weighs_uniformly
from flower_split.server.inner.state import begin_again, load_state, state_of
from flower_split.server.inner.sync_check import check_synchronised, check_unchanged
from flower_split.server.metric_sinks import MetricSinks
from flower_split.server.node_view import NodeView
from flower_split.server.privacy.mechanisms import check_wrapped
from flower_split.server.trunk_phase import TrunkPhase
from flower_split.server.trunk_rounds import TrunkRounds

logger = logging.getLogger(__name__)


class TrunkStrategy(Strategy):
    """Coordinate the trunk around ``inner``.

    Args:
        inner: Any Flower strategy whose clients return full adapter weights, or one of Flower's
            wrappers for differential privacy around it. Its own sampling must not ask for more
            nodes than take part in a phase. A wrapper belongs inside: what is committed must be
            what was noised.
        trunk_rounds: The run's rounds on the trunk.
        federation: The run's nodes, from the handshake.
        config: The run's configuration.
        largest_weights: Partition to the largest weight that this client can report truthfully, where
            Flower's strategies weigh clients by what they say; one above is refused.
        sinks: Where the clients' metrics go.
        client_keys: Keys that the clients' tokens are bound to; None: tokens are their bearer's.

    Attributes:
        client_keys: Keys that the clients' tokens are bound to.
        last_round: The run's last round; a loop that stops before the planned one says so here.

    Raises:
        ConfigError: The inner strategy would lose the noise of the wrapper around it.
    """

    def __init__(
        self,
        inner: Strategy,
        trunk_rounds: TrunkRounds,
        federation: Federation,
        config: RunConfig,
        *,
        largest_weights: Mapping[int, float] = MappingProxyType({}),
        sinks: MetricSinks = MetricSinks(),
        client_keys: ClientKeys | None = None,
    ) -> None:
        check_wrapped(inner)
        self.client_keys = client_keys or ClientKeys()
        self.inner = inner
        self.trunk_rounds = trunk_rounds
        self.federation = federation
        self.config = config
        self.last_round = config.num_server_rounds
        self._largest_weights = largest_weights
        self._sinks = sinks
        self._phase: TrunkPhase | None = None

    @property
    def phase(self) -> TrunkPhase | None:
        """Return the phase between its configure and its aggregate; None outside one."""
        return self._phase

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
        phase = self._close(server_round, evaluate=False)
        before = state_of(self.inner)
        try:
            kept, problems, report = self._completed(phase, replies)
            self._check(phase, kept)
            failpoints.reach("server.aggregate.before")
            contents = [
                self._for_inner(server_round, partition_id, reply)
                for partition_id, reply in kept.items()
            ]
            arrays, metrics = self._aggregate(server_round, contents)
            if self.config.shares_gradients:
                check_unchanged(arrays, kept, server_round)
            problems |= excluded_by(self.inner)  # the quorum is about the trunk's windows
            self.trunk_rounds.commit(server_round, report, arrays)
        except BaseException as error:  # also an interrupt: nothing of the round may stay
            self.trunk_rounds.abort(f"the ServerApp could not finish the round: {error}")
            load_state(self.inner, before)
            raise
        if problems:
            logger.warning(
                "round=%d went on without %s", server_round, describe(problems, self.federation)
            )
        return arrays, metrics

    # --------------------------------------------------------------- evaluate

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a trunk round whose sessions only evaluate; otherwise as :meth:`configure_train`."""
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
        phase = self._close(server_round, evaluate=True)
        good, problems = phase.sort(replies)
        self.trunk_rounds.abort(EVALUATION_ENDED)
        if not good:
            raise (RoundLost if phase.is_lost(problems) else FederationError)(
                f"round {server_round}: no client could evaluate. "
                f"{describe(problems, self.federation)}"
            )
        if problems:
            logger.warning(
                "round=%d evaluation without %s", server_round, describe(problems, self.federation)
            )
        for partition_id, reply in good.items():
            self._sinks.evaluation(server_round, partition_id, scalars(reply.content))
            if weighs_uniformly(self.inner):
                reply.content = with_uniform_weight(reply.content)
        return self.inner.aggregate_evaluate(server_round, list(good.values()))

    # ---------------------------------------------------------------- shared

    def _view(self, grid: Grid, server_round: int, fraction: float, phase: str) -> NodeView:
        """Return the grid with only the nodes chosen for this phase, in order of partitions.

        Everybody evaluates before the first and after the last round, so that the two compare.
        """
        partition_ids = self.federation.partition_ids
        whole = phase == "evaluate" and server_round in (0, self.last_round)
        count = len(partition_ids) if whole else num_participants(len(partition_ids), fraction)
        if count < len(partition_ids):
            generator = random.Random(f"{self.config.seed}/{server_round}/{phase}")
            partition_ids = sorted(generator.sample(partition_ids, count))
        return NodeView(
            grid, [self.federation.nodes[partition_id] for partition_id in partition_ids]
        )

    def _open(self, server_round: int, inner: list[Message], *, evaluate: bool) -> list[Message]:
        """Open the trunk's round for the clients that the inner strategy wrote to."""
        if not inner:
            raise FederationError(
                f"round {server_round}: the inner strategy {type(self.inner).__name__} chose no "
                "client. Its fraction-train and fraction-evaluate must be above 0; set the run "
                "config's instead."
            )
        chosen = {self.federation.partition_of(m.metadata.dst_node_id): m for m in inner}
        tokens = {
            partition_id: self.client_keys.new_token(partition_id)
            for partition_id in sorted(chosen)
        }
        self.trunk_rounds.begin(server_round, tokens, evaluate=evaluate)
        # Only now: the order carries the attempt that the trunk has just opened.
        messages = {
            partition_id: self.trunk_rounds.addressed(chosen[partition_id], token, server_round)
            for partition_id, token in tokens.items()
        }
        quorum = self.config.trunk.quorum_of(len(messages))
        self._phase = TrunkPhase(server_round, evaluate, messages, self.federation, quorum)
        return list(messages.values())

    def _close(self, server_round: int, *, evaluate: bool) -> TrunkPhase:
        """Return the open phase, which is over with this call.

        Raises:
            FederationError: The phase that is open is another one.
        """
        phase, self._phase = self._phase, None
        if phase is None or (phase.server_round, phase.evaluate) != (server_round, evaluate):
            raise FederationError(
                f"round {server_round}: aggregate was called without its configure; call the "
                "strategy's hooks in order."
            )
        return phase

    def _completed(
        self, phase: TrunkPhase, replies: Iterable[Message]
    ) -> tuple[dict[int, Message], dict[int, str], RoundReport]:
        """Return the replies of clients that completed, by partition, the others' problems, and the report.

        The trunk's round is prepared; both sides must have enough clients.
        """
        good, problems = phase.sort(replies)
        phase.check_enough(good, problems)
        clients = describe(problems, self.federation)
        report = self.trunk_rounds.prepare(phase.server_round, clients=clients)
        kept, problems = completed(good, problems, report)
        phase.check_enough(kept, problems)
        return kept, problems, report

    def _check(self, phase: TrunkPhase, kept: Mapping[int, Message]) -> None:
        """Check the replies that are about to be aggregated; the client of a bad one is named."""
        by_examples = self.config.strategy.weighting == "examples"
        weight = WEIGHT_METRICS["examples" if by_examples else "tokens"]
        check_values(kept, self.federation, phase.server_round, self.inner)
        if self.config.shares_gradients:
            check_synchronised(kept, self.federation, phase.server_round)
        check_for_inner(
            self.inner,
            kept,
            phase.messages,
            self.federation,
            phase.server_round,
            {weight: self._largest_weights},
        )
        factor = self.config.strategy.outlier_factor
        check_moves(self.inner, kept, phase.messages, self.federation, phase.server_round, factor)

    def _for_inner(self, server_round: int, partition_id: int, reply: Message) -> Message:
        """Return the reply as Flower's strategies expect it; its step metrics go to the sink."""
        content, steps = take_steps(reply.content)
        if steps:
            self._sinks.steps(server_round, partition_id, steps, scalars(reply.content))
        reply.content = with_uniform_weight(content) if weighs_uniformly(self.inner) else content
        return reply

    def _aggregate(
        self, server_round: int, replies: Sequence[Message]
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Let the inner strategy aggregate the replies; return its adapter in fp32.

        Raises:
            FederationError: It cannot, or its adapter is empty or not finite.
        """
        name = type(self.inner).__name__
        try:
            arrays, metrics = self.inner.aggregate_train(server_round, list(replies))
        except AppExitException as error:
            raise FederationError(
                f"round {server_round}: the inner strategy {name} cannot aggregate "
                f"{len(replies)} replies: {error}"
            ) from error
        if arrays is None or len(arrays) == 0:
            raise FederationError(
                f"round {server_round}: the inner strategy {name} returned no adapter from "
                f"{len(replies)} replies; see its messages in the log."
            )
        return checked_result(self.inner, arrays, server_round), metrics
