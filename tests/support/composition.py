"""Whole small runs with a grid that keeps what was sent and returned, for tests of composition."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from flower_split.client.app import app
from flower_split.config import Scalar, parse_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.server.inner.flower_strategies import InnerFactory
from tests.support.fakes import FakeGrid, reply
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import tiny_config

CLIENTS = 3
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Exchanged:
    """One training message and its reply, copied before anybody could change them."""

    server_round: int
    node: int
    sent: Weights
    returned: Weights
    metrics: Mapping[str, float]
    config: Mapping[str, object]


class RecordingGrid(LocalGrid):
    """Keeps every training exchange; ``stop_at`` ends the run before that round's replies."""

    def __init__(
        self,
        num_clients: int,
        config: Mapping[str, Scalar],
        client_app: ClientApp = app,
        stop_at: int = 0,
    ) -> None:
        super().__init__(num_clients, config, client_app)
        self.exchanged: list[Exchanged] = []
        self.stop_at = stop_at

    def pull_messages(self, message_ids):  # type: ignore[no-untyped-def]
        replies = list(super().pull_messages(message_ids))
        for item in replies:
            (message,) = (
                m for m in self.pushed if m.metadata.message_id == item.metadata.reply_to_message_id
            )
            if message.metadata.message_type == "train" and not item.has_error():
                self._keep(message, item)
        return replies

    def _keep(self, message: Message, item: Message) -> None:
        (config,) = message.content.config_records.values()
        number = int(str(config["flower-split.server-round"]))
        if self.stop_at and number >= self.stop_at:
            raise KeyboardInterrupt("the tests end the run here")
        (metrics,) = item.content.metric_records.values()
        self.exchanged.append(
            Exchanged(
                number,
                message.metadata.dst_node_id,
                weights(message),
                weights(item),
                dict(metrics.items()),  # type: ignore[arg-type]
                dict(config.items()),
            )
        )

    def rounds(self) -> list[list[Exchanged]]:
        """The exchanges of each round, in the order of nodes."""
        numbers = sorted({item.server_round for item in self.exchanged})
        return [
            sorted((i for i in self.exchanged if i.server_round == n), key=lambda i: i.node)
            for n in numbers
        ]


def weights(message: Message) -> Weights:
    (record,) = message.content.array_records.values()
    return {name: array.numpy().copy() for name, array in record.items()}


def record_of(values: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value.astype(np.float32)) for name, value in values.items()})


@dataclass(frozen=True)
class Outcome:
    """A finished run and what travelled in it."""

    directory: RunDirectory
    grid: RecordingGrid

    def adapter(self) -> Weights:
        return {k: v.numpy() for k, v in self.directory.read_adapter("client").items()}


@dataclass(frozen=True)
class Job:
    """Runs tiny jobs in this process."""

    root: Path
    model: Path
    data: str
    clients: int = CLIENTS
    base: Mapping[str, Scalar] = field(default_factory=dict)

    def config(self, name: str, **changes: Scalar) -> dict[str, Scalar]:
        given = {"num_server_rounds": 2, "trunk__step_every": "server-round", **changes}
        config = tiny_config(self.model, self.data, num_clients=self.clients, **given)
        return {**config, "run-dir": str(self.root / name)}

    def run(
        self,
        name: str,
        *,
        inner: InnerFactory | None = None,
        client_app: ClientApp = app,
        stop_at: int = 0,
        resume: bool = False,
        **changes: Scalar,
    ) -> Outcome:
        config = self.config(name, **changes)
        if resume:
            config["resume"] = config["run-dir"]
        grid = RecordingGrid(self.clients, config, client_app, stop_at)
        run(grid, parse_run_config(config), inner)
        return Outcome(RunDirectory.open(self.root / name), grid)


def by_hand(
    strategy: Strategy,
    rounds: list[list[Exchanged]],
    change: Callable[[Weights], Weights] = lambda values: values,
) -> list[Weights]:
    """What ``strategy`` makes of the same replies, with nothing of this package around it.

    Args:
        strategy: A fresh one of Flower's.
        rounds: From :meth:`RecordingGrid.rounds`; what was sent in the first is where it begins.
        change: Of every aggregate, before the next round.

    Returns:
        The adapter after every round.
    """
    current, results = rounds[0][0].sent, []
    for number, items in enumerate(rounds, start=1):
        grid = FakeGrid([item.node for item in items], lambda _: None)
        sent = strategy.configure_train(number, record_of(current), ConfigRecord(), grid)
        messages = {m.metadata.dst_node_id: m for m in sent}
        replies = [
            reply(
                messages[item.node],
                RecordDict(
                    {
                        "arrays": record_of(item.returned),
                        "metrics": MetricRecord(dict(item.metrics)),
                    }
                ),
            )
            for item in items
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        current = change({k: v.numpy().astype(np.float32) for k, v in arrays.items()})
        results.append(current)
    return results


def equal(found: Weights, expected: Weights) -> bool:
    return list(found) == list(expected) and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )
