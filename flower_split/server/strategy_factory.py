"""Make the run's strategy: the clients' initial adapter, who holds which part of it, the commit point."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.aggregation.from_config import check_clients
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.lora import initial_client_adapter
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.client_facts import ClientFacts
from flower_split.parties.client_cuts import check_resumed, cut_notes, cut_specs, overlap_adapter
from flower_split.parties.client_ranks import OwnLora, rank_specs
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.protocol.values import RoundReport
from flower_split.runs.manifest import Resumed, RunCheckpoints
from flower_split.runs.private_factors import FOLDER as PRIVATE_FOLDER
from flower_split.server.federation.base_values import gather_base_values
from flower_split.server.federation.client_keys import ClientKeys
from flower_split.server.federation.nodes import Federation
from flower_split.server.inner.flower_strategies import InnerContext, InnerFactory, inner_notes
from flower_split.server.inner.lora_fedavg import LoraFedAvg
from flower_split.server.inner.state import check_resumable, load_state, state_of
from flower_split.server.metric_sinks import MetricSinks
from flower_split.server.privacy.accounting import privacy_notes
from flower_split.server.privacy.mechanisms import own_inner, with_privacy
from flower_split.server.recorder import Recorder
from flower_split.server.step_ends import step_notes
from flower_split.server.trunk_connection import ConnectedTrunk
from flower_split.server.trunk_rounds import StartingPoint, TrunkRounds
from flower_split.server.trunk_strategy import TrunkStrategy
from flower_split.split import CutLayers
from flower_split.split.loading.model_source import ModelSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """Everything that a run's strategy is made from, once the clients have answered."""

    grid: Grid
    config: RunConfig
    trunk: ConnectedTrunk
    federation: Federation
    facts: Mapping[int, ClientFacts]  # by partition
    client_keys: ClientKeys  # that tokens are bound to
    recorder: Recorder
    checkpoints: RunCheckpoints
    resumed: Resumed | None  # None: a new run
    start: StartingPoint  # experiment, attempt and base of the first round


def make_strategy(
    parts: RunParts, make_inner: InnerFactory | None = None
) -> tuple[TrunkStrategy, ArrayRecord]:
    """Return the run's strategy and the adapter it begins with; both go on from a resumed round.

    A new run's beginning is committed as round 0, so that it can be resumed before round 1 is done.

    Args:
        parts: What it is made from.
        make_inner: The app's own inner strategy; None: what ``strategy.*`` and ``privacy.*`` name.

    Raises:
        FlowerSplitError: Strategy, clients, configuration and resumed run do not go together.
    """
    config, recorder, resumed = parts.config, parts.recorder, parts.resumed
    context = inner_context(parts.grid, config, parts.federation, parts.facts)
    inner, notes = inner_strategy(context, parts.facts, parts.federation, make_inner)
    for note in notes:
        logger.warning("%s", note)
        recorder.notes.append(note)
    arrays = to_arrays(context.initial)
    if isinstance(inner, LoraFedAvg):
        arrays = inner.initial_arrays()
        inner.private_folder = str(recorder.run.path / PRIVATE_FOLDER)
        inner.keeps_optimizer = config.keeps_optimizer
        inner.keeps_personal = config.evaluation.personalised
        inner.scales_client_rate = config.scales_client_rate
    if resumed is not None:
        check_resumed(resumed.adapter, context.initial)
        check_resumable(inner)
        load_state(inner, resumed.strategy)
        arrays = to_arrays(resumed.adapter)
    commit = CommitPoint(parts.start.experiment, parts.checkpoints, recorder, inner)
    trunk_rounds = TrunkRounds(
        parts.trunk.coordinator,
        parts.trunk.access,
        config,
        parts.start,
        steps_per_round=max(item.planned_steps for item in parts.facts.values()),
        on_commit=commit,
    )
    strategy = TrunkStrategy(
        inner,
        trunk_rounds,
        parts.federation,
        config,
        largest_weights=largest_weights(config, parts.facts),
        sinks=metric_sinks(recorder),
        client_keys=parts.client_keys,
    )
    strategy.summary()
    if resumed is None:
        commit(0, trunk_rounds.attempt, _NOTHING, arrays)
    return strategy, arrays


_NOTHING = RoundReport(version=0, digest="", slots=(), optimizer_steps=0, compute_seconds=0.0)


def metric_sinks(recorder: Recorder) -> MetricSinks:
    """Return the recorder's methods as the sinks of the strategy and the asynchronous loop."""
    return MetricSinks(
        steps=recorder.steps, evaluation=recorder.evaluation, arrivals=recorder.arrivals
    )


class CommitPoint:
    """Make rounds last: the round's metrics, then the manifest, whose renaming is the commit.

    See :data:`flower_split.server.trunk_rounds.CommitSink`.

    Args:
        experiment: Name of the run on the trunk.
        checkpoints: The run's checkpoints.
        recorder: The run's metrics.
        inner: The inner strategy, whose state is kept with the round.
    """

    def __init__(
        self, experiment: str, checkpoints: RunCheckpoints, recorder: Recorder, inner: Strategy
    ) -> None:
        self._experiment = experiment
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._inner = inner

    def __call__(
        self, server_round: int, attempt: int, report: RoundReport, adapter: ArrayRecord
    ) -> None:
        """Commit a round; round 0 is the run's beginning, of which the trunk knows nothing.

        Raises:
            RunDirectoryError: It cannot be written; the round never was.
        """
        if server_round:
            self._recorder.trunk_round(server_round, attempt, report)
            if isinstance(self._inner, LoraFedAvg):
                self._recorder.aggregation(server_round, self._inner.last_summary)
        self._checkpoints.commit(
            experiment=self._experiment,
            server_round=server_round,
            attempt=attempt,
            trunk_digest=report.digest,
            trunk_version=report.version,
            adapter=from_arrays(adapter),
            strategy=state_of(self._inner),
        )


def inner_context(
    grid: Grid, config: RunConfig, federation: Federation, facts: Mapping[int, ClientFacts]
) -> InnerContext:
    """Gather the clients' adapter before round 1, and who holds which part of it at which rank.

    Args:
        grid: Flower's grid; clients are asked for initial values that only base weights say.
        config: The run's configuration.
        federation: The nodes by partition.
        facts: Partition to what the client said of itself.

    Raises:
        FederationError: Clients do not answer, or their base weights differ.
        ConfigError: Ranks or cut layers do not fit the model.
    """
    state, scales = initial_client_adapter(
        ModelSource.of(config.model),
        model_cuts(config),
        client_parts(config),
        seed=config.seed,
        fetch=lambda shapes: gather_base_values(
            grid, federation, facts, shapes, timeout=config.round_timeout
        ),
    )
    cuts = client_cut_layers(config, facts)
    overlap, overlap_scales = overlap_adapter(config, cuts.values())
    state, scales = {**state, **overlap}, {**scales, **overlap_scales}
    return InnerContext(
        config=config,
        num_clients=len(federation.nodes),
        initial=state,
        scales=scales,
        partition_of=federation.partition_of,
        specs=cut_specs(config, cuts, state, client_specs(config, facts, scales)),
    )


def inner_strategy(
    context: InnerContext,
    facts: Mapping[int, ClientFacts],
    federation: Federation,
    make_inner: InnerFactory | None = None,
) -> tuple[Strategy, list[str]]:
    """Make the inner strategy; return it with the notes that log and report should hold.

    Args:
        context: What it is made from.
        facts: Partition to what the client said of itself.
        federation: The nodes by partition, for errors.
        make_inner: The app's own; None: what ``strategy.*`` and ``privacy.*`` name.

    Raises:
        ConfigError: It does not go with the configuration.
        AggregationError: It does not go with what the clients hold.
    """
    config = context.config
    if make_inner is None and config.strategy.aggregates_lora:
        check_clients(
            config.strategy, context.specs, context.num_sampled, federation.nodes.__getitem__
        )
    if config.shares_gradients and context.specs:
        raise ConfigError(
            'train.sync = "gradients" needs the same LoRA and the same cut layers on every client; '
            f"those of partitions {', '.join(map(str, sorted(context.specs)))} have their own (node "
            'config). Leave them out, or set train.sync = "rounds".'
        )
    inner = with_privacy(context) if make_inner is None else own_inner(context, make_inner)
    if isinstance(inner, LoraFedAvg):
        inner.largest_weights = largest_weights(config, facts)
    notes = inner_notes(context) if make_inner is None else []
    notes += step_notes(config)
    cuts = client_cut_layers(config, facts)
    return inner, notes + privacy_notes(context, inner) + cut_notes(config, cuts)


def client_cut_layers(config: RunConfig, facts: Mapping[int, ClientFacts]) -> dict[int, CutLayers]:
    """Return where each client's model is cut, by partition."""
    return {partition_id: item.cuts or model_cuts(config) for partition_id, item in facts.items()}


def client_specs(
    config: RunConfig, facts: Mapping[int, ClientFacts], scales: Mapping[str, float]
) -> dict[int, AdapterSpec]:
    """Return what a client holds of the adapter, by partition, for those that do not hold all of it."""
    own = {
        partition_id: OwnLora(rank=item.lora_rank, alpha=item.lora_alpha)
        for partition_id, item in facts.items()
    }
    specs = rank_specs(config, own, scales)
    if specs:
        logger.info(
            "clients with a LoRA rank or scale of their own, by partition: %s",
            ", ".join(f"{partition_id}: {own[partition_id]}" for partition_id in specs),
        )
    return specs


def largest_weights(config: RunConfig, facts: Mapping[int, ClientFacts]) -> dict[int, float]:
    """Return the largest weight that each client can report truthfully; empty where all count the same."""
    if config.strategy.weighting == "uniform":
        return {}
    train = config.train
    in_a_step = train.batch_size * train.gradient_accumulation_steps
    if config.strategy.weighting == "tokens":
        in_a_step *= train.sequence_length
    return {
        partition_id: float(item.planned_steps * in_a_step) for partition_id, item in facts.items()
    }
