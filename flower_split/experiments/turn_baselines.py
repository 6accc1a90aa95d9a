"""Baselines whose clients train one after the other, or from one adapter, with the whole model in reach.

All of them train by :func:`flower_split.training.round.train_round` on the clients' own batches, as many
optimizer steps of each client as in the run. The optimizer of bottom and top begins anew with every
client's turn, as in the run; that of a trunk which all of them share goes on.

Next: ``flower_split/experiments/baselines.py``, which names them.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flower_split.client.alone import names_of_trunk, part_optimizers
from flower_split.client.client import SAME_AS_RUN, Client
from flower_split.experiments.baseline_records import (
    evaluate_all,
    evaluate_if_due,
    record_training,
    write_adapters,
)
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from flower_split.training.measures import TrainResult
from flower_split.training.optimizers import PartOptimizer
from flower_split.training.round import train_round

Adapter = Mapping[str, Tensor]


@dataclass(slots=True)
class Turns:
    """What a run of turns goes on with."""

    clients: Sequence[Client]
    recorder: Recorder
    trunk: list[PartOptimizer] = field(
        default_factory=list
    )  # of a shared trunk; empty: not yet made

    def train(self, client: Client, server_round: int, adapter: Adapter) -> tuple[Adapter, int]:
        """Train one client's turn, everything by new optimizers; return its adapter and tokens."""
        model, _ = client.kept.whole_model(SAME_AS_RUN)
        load_adapter_state(model, adapter)
        return self._round(client, server_round, part_optimizers(client, model))

    def train_with_shared_trunk(
        self, client: Client, server_round: int, adapter: Adapter
    ) -> tuple[Adapter, int]:
        """Train one client's turn, the trunk by the optimizer that all turns share."""
        model, _ = client.kept.whole_model(SAME_AS_RUN)
        load_adapter_state(model, adapter)
        own, *trunk = part_optimizers(client, model)
        self.trunk = self.trunk or trunk
        return self._round(client, server_round, [own, *self.trunk])

    def clients_part(self, adapter: Adapter) -> Adapter:
        """Return what of an adapter a split model's clients hold: that of bottom and top."""
        first = self.clients[0]
        model, _ = first.kept.whole_model(SAME_AS_RUN)
        of_trunk = names_of_trunk(first, model, adapter)
        return {name: tensor for name, tensor in adapter.items() if name not in of_trunk}

    def count(self, client: Client, adapter: Adapter) -> None:
        """Count the bytes of an adapter that a client is given, and gives back trained."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
        self.recorder.traffic.add(client.partition_id, "adapters", up=size, down=size)

    def _round(
        self, client: Client, server_round: int, optimizers: Sequence[PartOptimizer]
    ) -> tuple[Adapter, int]:
        model, _ = client.kept.whole_model(SAME_AS_RUN)
        result: TrainResult = train_round(
            model,
            client.batches(server_round),
            client.config,
            client.position(server_round),
            None,
            optimizers=optimizers,
        )
        record_training(self.recorder, server_round, client.partition_id, result, with_steps=True)
        return adapter_state(model), result.num_tokens


Round = Callable[[Turns, int, Adapter], Adapter]
"""Takes the turns, the round from 1, and the adapter that it begins with; returns the next one."""


def run_rounds(clients: Sequence[Client], recorder: Recorder, one_round: Round) -> None:
    """Run all rounds of a baseline, evaluate where the run does, and write the adapters."""
    model, initial = clients[0].kept.whole_model(SAME_AS_RUN)
    adapter: Adapter = {name: tensor.clone() for name, tensor in initial.items()}
    evaluate_all(clients, recorder, 0, adapter)
    turns = Turns(clients, recorder)
    for server_round in range(1, recorder.config.num_server_rounds + 1):
        start = time.monotonic()
        adapter = one_round(turns, server_round, adapter)
        evaluate_if_due(clients, recorder, server_round, adapter)
        recorder.round_done(RoundOutcome(server_round, time.monotonic() - start))
    load_adapter_state(model, adapter)
    write_adapters(recorder, clients[0], model)


def federated_round(turns: Turns, server_round: int, adapter: Adapter) -> Adapter:
    """Train the whole model on each client from one adapter, and average by tokens."""
    trained = []
    for client in turns.clients:
        trained.append(turns.train(client, server_round, adapter))
        turns.count(client, adapter)
    return mean_by_tokens(trained)


def split_fed_v1_round(turns: Turns, server_round: int, adapter: Adapter) -> Adapter:
    """Train each client with a trunk of its own from one adapter, and average all parts by tokens.

    It is the arithmetic of :func:`federated_round`; the trunk's copies stay on the server.
    """
    of_client = turns.clients_part(adapter)
    trained = []
    for client in turns.clients:
        trained.append(turns.train(client, server_round, adapter))
        turns.count(client, of_client)
    return mean_by_tokens(trained)


def sequential_round(turns: Turns, server_round: int, adapter: Adapter) -> Adapter:
    """Train one client after the other, each from where the one before it stopped."""
    for client in turns.clients:
        adapter, _ = turns.train_with_shared_trunk(client, server_round, adapter)
        turns.count(client, turns.clients_part(adapter))
    return adapter


def split_fed_v2_round(turns: Turns, server_round: int, adapter: Adapter) -> Adapter:
    """Train one trunk with one client after the other; average bottoms and tops by tokens."""
    of_client = turns.clients_part(adapter)
    of_trunk = adapter.keys() - of_client.keys()
    order = list(turns.clients)
    random.Random(f"{turns.recorder.config.seed}/{server_round}").shuffle(order)
    trained, trunk = [], {name: adapter[name] for name in of_trunk}
    for client in order:
        found, tokens = turns.train_with_shared_trunk(client, server_round, {**adapter, **trunk})
        trunk = {name: found[name] for name in of_trunk}
        trained.append((found, tokens))
        turns.count(client, of_client)
    return {**mean_by_tokens(trained), **trunk}


def mean_by_tokens(trained: Iterable[tuple[Adapter, int]]) -> Adapter:
    """Return the mean of adapters, each weighed by its label tokens; summed in float64."""
    pairs = list(trained)
    total = sum(tokens for _, tokens in pairs)
    means = {}
    for name, like in pairs[0][0].items():
        summed = torch.zeros(like.shape, dtype=torch.float64)
        for adapter, tokens in pairs:
            summed += adapter[name].to("cpu", torch.float64) * (tokens / total)
        means[name] = summed.to(like)
    return means
