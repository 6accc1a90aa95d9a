"""The default inner strategy: Flower's FedAvg with a LoRA-aware aggregator in place of the mean.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), over adapters: clients return full adapter weights, and the server
computes each client's change against what it sent *to that client*: clients may hold other ranks,
scales and modules than each other (:class:`flower_split.aggregation.modules.AdapterSpec`).
"""

# ruff: noqa: TID251
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flower_split.aggregation import METHODS
from flower_split.aggregation.modules import AdapterAggregator, AdapterSpec, AdapterUpdate
from flower_split.arrays import from_arrays, to_arrays
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.facts import TRAINABLE

_WEIGHT_KEYS = {"tokens": "num-tokens", "examples": "num-examples", "uniform": ""}


def _check_method(name: str) -> None:
    """Refuse a method that needs clients to keep what they cannot keep here.

    Raises:
        AggregationError: The method changes the clients' base weights, or keeps factors private.
    """
    method = METHODS[name]
    usable = [n for n, m in METHODS.items() if not m.changes_base and not m.private]
    needs = "a change of every client's base weights" if method.changes_base else ""
    needs = "factors that stay with each client" if method.private else needs
    if needs:
        raise AggregationError(
            f'strategy.aggregator = "{name}" needs {needs}, which the ClientApp does not do; it is '
            f"there for use in code, in flower_split.aggregation. Use one of {', '.join(usable)}."
        )


class LoraFedAvg(FedAvg):
    """FedAvg whose aggregation is a method of :mod:`flower_split.aggregation`.

    It takes everybody it is shown: the strategy around it samples the clients.

    Args:
        config: Aggregator, weighting and server learning rate.
        scales: Module name to ΔW scale, of the clients' adapters.
        initial: The adapter before round 1, by tensor name.
        slot_of: A node's slot; sums run in slot order, so that they are repeatable.
        specs: Slot to what that client holds of the adapter; slots that are not named hold all of
            it, at the initial ranks and scales.
    """

    def __init__(
        self,
        config: StrategyConfig,
        scales: Mapping[str, float],
        initial: Mapping[str, Tensor],
        slot_of: Callable[[int], int],
        specs: Mapping[int, AdapterSpec] = MappingProxyType({}),
    ) -> None:
        super().__init__(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key="num-tokens",
        )
        self.weighting = config.weighting
        self.aggregator = AdapterAggregator(
            config.aggregator, scales, learning_rate=config.server_learning_rate
        )
        _check_method(config.aggregator)
        self.aggregator.init(initial)
        self._initial = dict(initial)
        self._slot_of = slot_of
        self._specs = dict(specs)
        self._sent: Mapping[int, Mapping[str, Tensor]] = {}  # slot -> what this round sent to it
        for spec in self._specs.values():  # what cannot be served ends the run now
            self.aggregator.distribute(spec.ranks, spec.scales, spec.modules)

    def initial_arrays(self) -> ArrayRecord:
        """The global adapter before round 1, of every module at its initial rank."""
        return to_arrays(self.aggregator.distribute())

    def state_dict(self) -> dict[str, Tensor]:
        """The aggregator's state; see :class:`flower_split.checkpoint.Resumable`."""
        return self.aggregator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        self.aggregator.load_state_dict(state, self._initial)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, but to each client its own adapter, and what trains where some is frozen.

        What is sent is remembered until the next call: a client's change is measured against it.
        """
        messages = list(super().configure_train(server_round, arrays, config, grid))
        trainable = set(self.aggregator.trainable())
        self._sent = self._address(messages, arrays)
        for message in messages:
            sent = self._sent[self._slot_of(message.metadata.dst_node_id)]
            if not sent.keys() <= trainable:
                content = RecordDict(dict(message.content.items()))
                own = {**dict(config.items()), TRAINABLE: sorted(sent.keys() & trainable)}
                content[self.configrecord_key] = ConfigRecord(own)
                message.content = content
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, but to each client its own adapter."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self._address(messages, arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the adapters of ``replies``, which hold no errors.

        Raises:
            AggregationError: There is no reply, the weights are all zero, or an update is invalid;
                the client is named.
        """
        updates, contents = [], []
        for reply in replies:
            slot = self._slot_of(reply.metadata.src_node_id)
            (arrays,) = reply.content.array_records.values()
            (metrics,) = reply.content.metric_records.values()
            spec = self._specs.get(slot, AdapterSpec())
            updates.append(
                AdapterUpdate(
                    client_id=slot,
                    received=self._sent[slot],
                    returned=from_arrays(arrays),
                    weight=self._weight(metrics, slot),
                    scales=spec.scales,
                    modules=spec.modules,
                )
            )
            contents.append(reply.content)
        self.aggregator.aggregate(updates)
        metrics_of_all = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return to_arrays(self.aggregator.distribute()), metrics_of_all

    def _address(
        self, messages: Iterable[Message], arrays: ArrayRecord
    ) -> dict[int, Mapping[str, Tensor]]:
        """Put each receiver's own adapter into its message; returns them by slot.

        A client without a spec of its own gets ``arrays`` as they are. Clients of equal specs
        share their tensors.
        """
        common = from_arrays(arrays)
        kinds: list[tuple[AdapterSpec, Mapping[str, Tensor], ArrayRecord]] = []
        sent: dict[int, Mapping[str, Tensor]] = {}
        for message in messages:
            slot = self._slot_of(message.metadata.dst_node_id)
            spec = self._specs.get(slot)
            if spec is None:
                sent[slot] = common
                continue
            if not any(spec == known for known, _, _ in kinds):
                state = self.aggregator.distribute(spec.ranks, spec.scales, spec.modules)
                kinds.append((spec, state, to_arrays(state)))
            sent[slot], own = next((s, a) for known, s, a in kinds if known == spec)
            message.content = RecordDict(
                {**dict(message.content.items()), self.arrayrecord_key: own}
            )
        return sent

    def _weight(self, metrics: MetricRecord, slot: int) -> float:
        key = _WEIGHT_KEYS[self.weighting]
        if not key:
            return 1.0
        value = metrics.get(key)
        if not isinstance(value, (int, float)):
            raise AggregationError(
                f'strategy.weighting = "{self.weighting}" needs {key} in every reply; that of '
                f"partition {slot} has {value!r}."
            )
        return float(value)
