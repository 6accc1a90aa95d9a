"""FedBuff: aggregate a buffer of asynchronous arrivals into the clients' adapter.

John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Michael Rabbat, Mani Malek, Dzmitry Huba,
"Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022 (arXiv 2106.06639).

A server round is a buffer of K arrivals. Each arrival i is measured against the adapter that its client
was sent, at version ``v_i``, and applied to the version ``t`` of the round: with staleness
``τ_i = t − v_i`` and the client's weight ``w_i``::

    ΔW ← ΔW + η · Σ s(τ_i) w_i (s_i B_i A_i − what client i was sent) / Σ w_i

which with equal weights is the paper's ``η / K · Σ s(τ_i) Δ_i``. It is ``product-delta`` with stale
arrivals counting less, so ranks, scales and server optimizers are those of any round; methods that
average what clients return instead of what they changed would pull the global adapter back to the
versions that stale clients began with, and are refused. What is no LoRA factor (biases, whole modules,
DoRA's magnitudes) moves by the same mean of changes; magnitudes are exact in a buffer whose clients all
began alike (:mod:`flower_split.aggregation.rules.dora`).

Clients are sent out and collected by :mod:`flower_split.server.asynchronous`; the
trunk's side is :mod:`flower_split.trunk.engine.dispatches`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from flower_split.aggregation.adapter_aggregator import AdapterSpec, AdapterUpdate
from flower_split.aggregation.rules.staleness import Discounted, Staleness
from flower_split.config import StrategyConfig
from flower_split.errors import AggregationError
from flower_split.messages.arrays import to_arrays
from flower_split.messages.orders import TrainOrder
from flower_split.protocol.values import Dispatch
from flower_split.server.inner.lora_fedavg import LoraFedAvg

_STATE = "fedbuff/"


@dataclass(frozen=True, slots=True, eq=False)
class ClientArrival:
    """The reply to one dispatch, beside what was sent.

    Args:
        dispatch: As it was sent out.
        base_round: Committed rounds at that time: the version of what it was sent.
        sent: The adapter it was sent, by tensor name.
        content: Its reply.
    """

    dispatch: Dispatch
    base_round: int
    sent: Mapping[str, Tensor]
    content: RecordDict

    @property
    def name(self) -> str:
        """Return its name in errors, which also orders the sums: by partition, then by dispatch."""
        return f"partition {self.dispatch.slot:05d} (dispatch {self.dispatch.number:07d})"

    def staleness(self, server_round: int) -> int:
        """Return the versions between what it was sent and what round ``server_round`` changes."""
        return server_round - 1 - self.base_round


class FedBuff(LoraFedAvg):
    """Write the clients' messages of an asynchronous run, and aggregate what comes back.

    Attributes:
        dispatched: The number of the latest dispatch.
        turns: Partition to how many of its trainings have been aggregated.

    Args:
        config: Aggregator, weighting, staleness; see :class:`~flower_split.config.StrategyConfig`.
        scales: As for :class:`LoraFedAvg`.
        initial: As for :class:`LoraFedAvg`.
        partition_of: As for :class:`LoraFedAvg`.
        specs: As for :class:`LoraFedAvg`.
    """

    def __init__(
        self,
        config: StrategyConfig,
        scales: Mapping[str, float],
        initial: Mapping[str, Tensor],
        partition_of: Callable[[int], int],
        specs: Mapping[int, AdapterSpec] = MappingProxyType({}),
    ) -> None:
        super().__init__(config, scales, initial, partition_of, specs)
        self.staleness = Staleness(name=config.staleness, exponent=config.staleness_exponent)
        self.dispatched = 0
        self.turns: dict[int, int] = {}

    def summary(self) -> None:
        """Log nothing: the settings of Flower's FedAvg are not those of this strategy."""

    def order(
        self, dispatch: Dispatch, node: int, arrays: ArrayRecord, *, ahead: int, ttl: float
    ) -> tuple[Message, Mapping[str, Tensor]]:
        """Return the message that sends a client to work, and the adapter that it carries.

        Args:
            dispatch: Who is sent.
            node: Its Flower node.
            arrays: The global adapter.
            ahead: Trainings of this client that have come back and are not aggregated yet.
            ttl: Seconds until Flower drops the message.
        """
        order = TrainOrder(
            data_pass=self.turns.get(dispatch.slot, 0) + ahead + 1,
            wants_weight_norms=self._dora is not None,
        )
        plain = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: ConfigRecord()})
        message = Message(order.write(plain), node, MessageType.TRAIN, ttl=ttl)
        sent = self._address([message], arrays)[dispatch.slot]
        return message, sent

    def aggregate_arrivals(
        self, server_round: int, arrivals: Sequence[ClientArrival]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Aggregate one round; return the new global adapter and the clients' metrics.

        The result does not depend on the order of ``arrivals``.

        Raises:
            AggregationError: There is no usable arrival, the weights are all zero, or an update is
                invalid and not to be excluded; client and dispatch are named.
        """
        updates: list[AdapterUpdate] = []
        partition_ids: dict[str | int, int] = {}
        malformed: dict[str | int, str] = {}
        norms: dict[str | int, Mapping[str, Tensor]] = {}
        for arrived in sorted(arrivals, key=lambda item: item.name):
            partition_ids[arrived.name] = arrived.dispatch.slot
            self._sent = {arrived.dispatch.slot: arrived.sent}
            try:
                update = self._update(arrived.dispatch.slot, arrived.content)
                if self._dora is not None:
                    norms[arrived.name] = self._norms(arrived.dispatch.slot, arrived.content)
                updates.append(replace(update, client_id=arrived.name))
            except AggregationError as error:
                if not self.excludes_invalid:
                    raise
                malformed[arrived.name] = str(error)
        if not updates:
            raise AggregationError("no client update to aggregate. " + " ".join(malformed.values()))
        factors: dict[str | int, float] = {
            arrived.name: self.staleness(arrived.staleness(server_round)) for arrived in arrivals
        }
        exact = [] if self._dora is None else [replace(self._dora, norms=norms)]
        discounted = Discounted(factors, self.aggregator.distribute())
        summary = self.aggregator.aggregate(updates, then=[*exact, discounted])
        excluded = {**malformed, **summary.excluded}
        used = [arrived for arrived in arrivals if arrived.name not in excluded]
        self.last_summary = replace(
            summary,
            clients=tuple(sorted(arrived.dispatch.slot for arrived in used)),
            excluded={partition_ids[name]: why for name, why in sorted(excluded.items(), key=str)},
        )
        contents = [arrived.content for arrived in sorted(used, key=lambda item: item.name)]
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        for partition_id in partition_ids.values():
            self.turns[partition_id] = self.turns.get(partition_id, 0) + 1
        return to_arrays(self.aggregator.distribute()), metrics

    def state_dict(self) -> dict[str, Tensor]:
        """Return the aggregator's state, the dispatches so far, and every client's trainings."""
        partition_ids = sorted(self.turns)
        return {
            **super().state_dict(),
            _STATE + "dispatched": torch.tensor([self.dispatched]),
            _STATE + "slots": torch.tensor(partition_ids, dtype=torch.int64),
            _STATE + "turns": torch.tensor(
                [self.turns[s] for s in partition_ids], dtype=torch.int64
            ),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state of :meth:`state_dict`."""
        super().load_state_dict({n: t for n, t in state.items() if not n.startswith(_STATE)})
        self.dispatched = int(state[_STATE + "dispatched"])
        partition_ids, turns = state[_STATE + "slots"].tolist(), state[_STATE + "turns"].tolist()
        self.turns = dict(zip(partition_ids, turns, strict=True))
