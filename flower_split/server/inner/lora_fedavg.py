"""The default inner strategy: Flower's FedAvg with a LoRA-aware aggregator in place of the mean.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), over adapters: clients return full adapter weights, and the server
computes each client's change against what it sent *to that client*: clients may hold other ranks,
scales and modules than each other (:class:`flower_split.aggregation.adapter_aggregator.AdapterSpec`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterSpec, AdapterUpdate, RoundSummary
from flower_split.aggregation.from_config import adapter_aggregator, check_adapter, fits_dora
from flower_split.aggregation.rules.dora import DoraMean, norms_from
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.lora.base_change import base_change_state
from flower_split.messages.arrays import from_arrays, to_arrays
from flower_split.messages.orders import TrainOrder
from flower_split.messages.replies import NUM_TOKENS, WEIGHT_METRICS, weight_norms
from flower_split.runs.private_factors import digests_of, private_state
from flower_split.server.inner.message_extras import add_base_change, kept_digest, leave_private


class LoraFedAvg(FedAvg):
    """FedAvg whose aggregation is a method of :mod:`flower_split.aggregation`.

    It takes everybody it is shown: the strategy around it samples the clients.

    A malformed update refuses the round or excludes its client (``on-invalid``). What an excluded
    client contributed to the trunk in that round stays: the trunk has checked every contribution by
    its own rules (finite, clipped, reduced robustly) and has no reason to distrust it. The weights of
    the others sum to 1 without it.

    Attributes:
        aggregator: The adapter over all rounds.
        excludes_invalid: Whether malformed updates are left out instead of refused.
        last_summary: Summary of the last aggregated round: which updates were used, who was excluded why.
        private_folder: Where simulated clients keep what stays with them, if anything does.
        keeps_optimizer: Whether a client's optimizer state stays with it from round to round.
        keeps_personal: Whether clients keep what they trained, and evaluate it beside the global adapter.
        scales_client_rate: Whether a client's learning rate is multiplied by the square root of how many
            clients are averaged, as they weigh; see
            :func:`flower_split.config.averaging.why_rate_as_it_is`.
        largest_weights: Partition to the largest weight that this client can report truthfully; one above
            is malformed. Partitions that are not named have no bound.

    Args:
        config: Aggregator with its options, rules, weighting and server optimizer.
        scales: Module name to ΔW scale, of the clients' adapters.
        initial: The adapter before round 1, by tensor name.
        partition_of: A node's partition; sums run in order of partitions, so that they are repeatable.
        specs: Partition to what that client holds of the adapter; partitions that are not named hold all of
            it, at the initial ranks and scales.
    """

    def __init__(
        self,
        config: StrategyConfig,
        scales: Mapping[str, float],
        initial: Mapping[str, Tensor],
        partition_of: Callable[[int], int],
        specs: Mapping[int, AdapterSpec] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key=NUM_TOKENS,
        )
        self.weighting = config.weighting
        self.aggregator = adapter_aggregator(config, scales)
        check_adapter(config, initial)
        self.aggregator.init(initial)
        self._dora = DoraMean(initial, scales) if fits_dora(config, initial) else None
        self._initial = dict(initial)
        self._partition_of = partition_of
        self._specs = dict(specs)
        self._sent: Mapping[
            int, Mapping[str, Tensor]
        ] = {}  # partition -> what this round sent to it
        self.excludes_invalid = config.on_invalid == "exclude"
        self.last_summary = RoundSummary(())
        self.private_folder = ""
        self.keeps_optimizer = False
        self.keeps_personal = False
        self.scales_client_rate = False
        self.largest_weights: Mapping[int, float] = MappingProxyType({})
        self._digests: dict[int, str] = {}  # partition -> of what it keeps, last committed round
        tried: list[AdapterSpec] = []
        for spec in self._specs.values():  # what cannot be served ends the run now
            if spec not in tried:
                self.aggregator.distribute(spec.ranks, spec.scales, spec.modules)
                tried.append(spec)

    def initial_arrays(self) -> ArrayRecord:
        """Return the global adapter before round 1, with every module at its initial rank."""
        return to_arrays(self.aggregator.distribute())

    @property
    def changes_base(self) -> bool:
        """Return whether the method changes the clients' base weights."""
        return self.aggregator.method.changes_base

    def base_change(self) -> dict[str, Tensor]:
        """Return what every client adds to its base by now; see :mod:`flower_split.lora.base_change`."""
        return base_change_state(self.aggregator.base_changes())

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next round needs; see :class:`flower_split.runs.manifest.Resumable`."""
        return self.aggregator.state_dict() | private_state(self._digests)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of :meth:`state_dict`."""
        self.aggregator.load_state_dict(state, self._initial)
        self._digests = digests_of(state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its own adapter, and say what trains where some of it is frozen.

        What is sent is kept until the next call: a client's change is measured against it.
        """
        messages = list(super().configure_train(server_round, arrays, config, grid))
        trainable = set(self.aggregator.trainable())
        factor = self._rate_factor(messages)
        self._sent = self._address(messages, arrays)
        for message in messages:
            sent = self._sent[self._partition_of(message.metadata.dst_node_id)]
            all_train = sent.keys() <= trainable
            order = TrainOrder(
                trainable=None if all_train else tuple(sorted(sent.keys() & trainable)),
                wants_weight_norms=self._dora is not None,
                rate_factor=factor,
            )
            message.content = order.write(message.content)
        self._add_residuals(messages, train=True)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its own adapter."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self._address(messages, arrays)
        self._add_residuals(messages, train=False)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the adapters of ``replies``, which hold no errors.

        Raises:
            AggregationError: There is no usable reply, the weights are all zero, or an update is
                invalid and not to be excluded; the client is named.
        """
        updates: list[AdapterUpdate] = []
        digests: dict[int, str] = {}
        norms: dict[str | int, Mapping[str, Tensor]] = {}
        contents: dict[int, RecordDict] = {}
        malformed: dict[str | int, str] = {}
        for reply in replies:
            partition_id = self._partition_of(reply.metadata.src_node_id)
            try:
                update = self._update(partition_id, reply.content)
                keeps = self.keeps_optimizer or self.keeps_personal
                keeps = keeps or bool(self.aggregator.method.private)
                digest = kept_digest(partition_id, reply.content) if keeps else {}
                if self._dora is not None:
                    norms[partition_id] = self._norms(partition_id, reply.content)
                updates.append(update)  # only now: nothing of it may be malformed
                digests |= digest
                contents[partition_id] = reply.content
            except AggregationError as error:
                if not self.excludes_invalid:
                    raise
                malformed[partition_id] = str(error)
        if not updates:
            raise AggregationError("no client update to aggregate. " + " ".join(malformed.values()))
        exact = [] if self._dora is None else [replace(self._dora, norms=norms)]
        summary = self.aggregator.aggregate(updates, then=exact)
        excluded = dict(sorted({**malformed, **summary.excluded}.items(), key=lambda item: item[0]))
        self.last_summary = replace(summary, excluded=excluded)
        self._digests |= {
            partition_id: d for partition_id, d in digests.items() if partition_id not in excluded
        }
        honest = [
            content for partition_id, content in contents.items() if partition_id not in excluded
        ]
        metrics = self.train_metrics_aggr_fn(honest, self.weighted_by_key)
        return to_arrays(self.aggregator.distribute()), metrics

    def _rate_factor(self, messages: Sequence[Message]) -> float:
        """Return the root of how many clients are averaged, as they weigh: (Σ w)² / Σ w² of them.

        Their weights are what they can report at most, which is known beforehand; where that is not,
        all count the same.
        """
        if not self.scales_client_rate:
            return 1.0
        known = self.largest_weights
        partitions = [self._partition_of(message.metadata.dst_node_id) for message in messages]
        weights = [known[p] for p in partitions if p in known]
        if len(weights) < len(partitions) or not any(weights):
            return math.sqrt(len(messages))
        return math.sqrt(sum(weights) ** 2 / sum(weight * weight for weight in weights))

    def _update(self, partition_id: int, content: RecordDict) -> AdapterUpdate:
        """Return what a client returned, beside what it was sent.

        Raises:
            AggregationError: The reply does not hold one adapter and its weight.
        """
        records, metrics = content.array_records, content.metric_records
        if len(records) != 1 or len(metrics) != 1:
            raise AggregationError(
                f"client {partition_id} returned {len(records)} ArrayRecords and {len(metrics)} "
                "MetricRecords; it must be one of each."
            )
        spec = self._specs.get(partition_id, AdapterSpec())
        return AdapterUpdate(
            client_id=partition_id,
            received=self._sent[partition_id],
            returned=from_arrays(next(iter(records.values()))),
            weight=self._weight(next(iter(metrics.values())), partition_id),
            scales=spec.scales,
            modules=spec.modules,
        )

    def _norms(self, partition_id: int, content: RecordDict) -> dict[str, Tensor]:
        """Return the norms that a client reports of its modules with DoRA.

        Raises:
            AggregationError: It does not say them, or they cannot be.
        """
        return norms_from(partition_id, weight_norms(content), self._sent[partition_id])

    def _address(
        self, messages: Iterable[Message], arrays: ArrayRecord
    ) -> dict[int, Mapping[str, Tensor]]:
        """Put each receiver's own adapter into its message; return them by partition.

        A client without a spec of its own gets ``arrays`` as they are. Clients of equal specs
        share their tensors.
        """
        common = from_arrays(arrays)
        kinds: list[tuple[AdapterSpec, Mapping[str, Tensor], ArrayRecord]] = []
        sent: dict[int, Mapping[str, Tensor]] = {}
        for message in messages:
            partition_id = self._partition_of(message.metadata.dst_node_id)
            spec = self._specs.get(partition_id)
            if spec is None:
                sent[partition_id] = common
                continue
            if not any(spec == known for known, _, _ in kinds):
                state = self.aggregator.distribute(spec.ranks, spec.scales, spec.modules)
                kinds.append((spec, state, to_arrays(state)))
            sent[partition_id], own = next((s, a) for known, s, a in kinds if known == spec)
            message.content = RecordDict(
                {**dict(message.content.items()), self.arrayrecord_key: own}
            )
        return sent

    def _add_residuals(self, messages: Sequence[Message], *, train: bool) -> None:
        """Add what a method has the clients hold beside the adapter, or keep to themselves."""
        add_base_change(messages, self.aggregator, self._spec_of)
        private, optimizer = self.aggregator.private(), train and self.keeps_optimizer
        for message in messages if private or optimizer or self.keeps_personal else ():
            leave_private(
                message,
                private,
                digest=self._digests.get(self._partition_of(message.metadata.dst_node_id), ""),
                folder=self.private_folder,
                arrays_key=self.arrayrecord_key,
                optimizer=optimizer,
                personal=self.keeps_personal,
            )

    def _spec_of(self, message: Message) -> AdapterSpec:
        return self._specs.get(self._partition_of(message.metadata.dst_node_id), AdapterSpec())

    def _weight(self, metrics: MetricRecord, partition_id: int) -> float:
        if self.weighting == "uniform":
            return 1.0
        key = WEIGHT_METRICS[self.weighting]
        value = metrics.get(key)
        if not isinstance(value, (int, float)):
            raise AggregationError(
                f'strategy.weighting = "{self.weighting}" needs {key} in every reply; that of '
                f"partition {partition_id} has {value!r}."
            )
        most = self.largest_weights.get(partition_id)
        if most is not None and value > most:
            raise AggregationError(
                f"client {partition_id} reports {key} = {value:g}, but its steps, batch size and sequence "
                f"length allow at most {most:g} in a round. Either its report is wrong, or its train.* "
                "settings differ from the run's."
            )
        return float(value)
