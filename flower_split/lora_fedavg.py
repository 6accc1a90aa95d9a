"""The default inner strategy: Flower's FedAvg with a LoRA-aware aggregator in place of the mean.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), over adapters: clients return full adapter weights, and the server
computes each client's change against what it sent.
"""

# ruff: noqa: TID251
from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flower_split.aggregation import METHODS
from flower_split.aggregation.modules import AdapterAggregator, AdapterUpdate
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
    """

    def __init__(
        self,
        config: StrategyConfig,
        scales: Mapping[str, float],
        initial: Mapping[str, Tensor],
        slot_of: Callable[[int], int],
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
        self._sent: dict[str, Tensor] = {}

    def initial_arrays(self) -> ArrayRecord:
        """What round 1 sends."""
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
        """As FedAvg; remembers what is sent, and says what trains where the method freezes some."""
        self._sent = from_arrays(arrays)
        trainable = self.aggregator.trainable()
        if set(trainable) != set(self._initial):
            config = ConfigRecord({**dict(config.items()), TRAINABLE: trainable})
        return super().configure_train(server_round, arrays, config, grid)

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
            updates.append(
                AdapterUpdate(
                    client_id=slot,
                    received=self._sent,
                    returned=from_arrays(arrays),
                    weight=self._weight(metrics, slot),
                )
            )
            contents.append(reply.content)
        self.aggregator.aggregate(updates)
        metrics_of_all = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return to_arrays(self.aggregator.distribute()), metrics_of_all

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
