"""Asynchronous rounds over real gRPC: every client's gradients are those of one version's unsplit model."""

import math
import threading
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.errors import TrunkRefused
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import Arrival, Dispatch, RoundPlan
from flower_split.split import CutLayers, set_trunk
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from tests.acceptance.federation import (
    SGD,
    Federation,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

RATE = SGD.learning_rate
LATE = 1 / math.sqrt(2)
Adapter = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = make_config(write_checkpoint(tmp_path_factory.mktemp("model")))
    return replace(config, trunk=replace(config.trunk, step_every="server-round"))


class Rounds:
    """The coordinator's side: who is at work, by dispatch."""

    def __init__(self, fed: Federation) -> None:
        self.fed = fed
        self.sent: dict[int, Dispatch] = {}
        self.number = 1

    def send(self, *numbers_and_slots: tuple[int, int]) -> None:
        for number, slot in numbers_and_slots:
            self.sent[number] = Dispatch(number, slot, f"token of {number}")
        plan = RoundPlan(
            experiment="test",
            server_round=self.number,
            attempt=0,
            participants={},
            step_every=StepEvery.BUFFER,
            num_server_rounds=9,
            join_seconds=20.0,
            window_seconds=20.0,
            dispatches=tuple(self.sent.values()),
        )
        self.fed.coordinator.begin_round(plan)

    def close(self, *arrivals: tuple[int, float]) -> None:
        named = [Arrival(number, factor) for number, factor in arrivals]
        self.fed.coordinator.prepare_round("test", self.number, 0, named)
        self.fed.coordinator.commit_round("test", self.number, 0)
        for number, _ in arrivals:
            del self.sent[number]
        self.number += 1

    def trunk(self) -> dict[str, Tensor]:
        return self.fed.coordinator.get_adapter()


def remote(fed: Federation, number: int, slot: int) -> RemoteTrunk:
    return RemoteTrunk(
        fed.address,
        token=f"token of {number}",
        fingerprint=fingerprint(fed.config),
        mode="joint",
        call_timeout=20.0,
        cuts=fed.cuts.get(slot),
    )


def work(
    fed: Federation, number: int, slot: int, adapter: Adapter, batch: Batch
) -> dict[str, Tensor]:
    """One client's local step as a dispatch; returns its adapter."""
    model = fed.client_model(slot)
    own = {name: adapter[name] for name in adapter_state(model)}
    load_adapter_state(model, own)
    trunk = remote(fed, number, slot)
    set_trunk(model, trunk)
    position = RoundPosition(server_round=1, num_server_rounds=9, num_steps=1, partition_id=slot)
    try:
        trunk.open(1)
        train_round(model, iter([batch]), fed.config, position, trunk)
    finally:
        trunk.close()
    return adapter_state(model)


def unsplit_step(config: RunConfig, client: Adapter, trunk: Adapter, batch: Batch) -> Adapter:
    """What one SGD step makes of all LoRA weights of the unsplit model."""
    whole = Whole(config)
    whole.load({**client, **trunk})
    return whole.sgd_step([batch], RATE)


def tokens_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("own", [None, CutLayers(3, 4)], ids=["same cuts", "own cuts"])
def test_clients_of_two_versions_each_compute_as_their_unsplit_model(
    config: RunConfig, own: CutLayers | None
) -> None:
    """Slot 0 works on version 0 while slot 1 is on version 1; then both make version 2."""
    start = adapter_state(Whole(config).model)
    start = perturbed(start, 1)
    batches = [make_batch(2, (9, 6), 1), make_batch(3, (8, 8, 5), 2), make_batch(2, (7, 7), 3)]
    with federation(config, {0: own} if own else {}) as fed:
        names = fed.coordinator.get_adapter().keys()
        fed.load_trunk({name: start[name] for name in names})
        old = {name: start[name] for name in names}
        client = {name: tensor for name, tensor in start.items() if name not in names}
        rounds = Rounds(fed)
        rounds.send((1, 0), (2, 1))
        work(fed, 2, 1, start, batches[1])
        rounds.close((2, 1.0))
        new = rounds.trunk()
        expected = unsplit_step(config, client, old, batches[1])
        for name in names:
            torch.testing.assert_close(new[name], expected[name], rtol=1e-5, atol=1e-7)
        rounds.send((3, 1))
        # What slot 0 holds beyond the others' bottom and top is as it was at the start.
        late = work(fed, 1, 0, start, batches[0])
        fresh = work(fed, 3, 1, start, batches[2])
        late_whole = unsplit_step(config, client, old, batches[0])
        fresh_whole = unsplit_step(config, client, new, batches[2])
        wrong = unsplit_step(config, client, new, batches[0])
        for found, whole in ((late, late_whole), (fresh, fresh_whole)):
            for name in found:
                torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-7)
        assert any((late[name] - wrong[name]).abs().max() > 1e-4 for name in late)
        rounds.close((1, LATE), (3, 1.0))
        tokens = tokens_of(batches[0]), tokens_of(batches[2])
        for name, found in rounds.trunk().items():
            g_late = (old[name] - late_whole[name]) / RATE
            g_fresh = (new[name] - fresh_whole[name]) / RATE
            step = (LATE * tokens[0] * g_late + tokens[1] * g_fresh) / sum(tokens)
            if own is not None and "layers.2." in name:  # slot 0 holds layer 2 itself
                step = g_fresh
            torch.testing.assert_close(found, new[name] - RATE * step, rtol=1e-4, atol=1e-6)


def test_clients_that_work_at_once_do_not_disturb_each_other(config: RunConfig) -> None:
    """Forwards and backwards of two versions interleave on the wire; each is its own version's."""
    start = perturbed(adapter_state(Whole(config).model), 1)
    batches = [make_batch(2, (9, 6), 1), make_batch(3, (8, 8, 5), 2), make_batch(2, (7, 7), 3)]
    with federation(config) as fed:
        names = fed.coordinator.get_adapter().keys()
        fed.load_trunk({name: start[name] for name in names})
        old = {name: start[name] for name in names}
        client = {name: tensor for name, tensor in start.items() if name not in names}
        rounds = Rounds(fed)
        rounds.send((1, 0), (2, 1))
        work(fed, 2, 1, start, batches[1])
        rounds.close((2, 1.0))
        new = rounds.trunk()
        assert all((new[name] - old[name]).abs().max() > 1e-4 for name in names)
        rounds.send((3, 1))
        found: dict[int, Adapter] = {}

        def run(number: int, slot: int, batch: Batch) -> None:
            found[slot] = work(fed, number, slot, start, batch)

        for slot in (0, 1):
            fed.client_model(slot)
        threads = [
            threading.Thread(target=run, args=(1, 0, batches[0])),
            threading.Thread(target=run, args=(3, 1, batches[2])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for slot, trunk, batch in ((0, old, batches[0]), (1, new, batches[2])):
            whole = unsplit_step(config, client, trunk, batch)
            for name in found[slot]:
                torch.testing.assert_close(found[slot][name], whole[name], rtol=1e-5, atol=1e-7)


def test_coordinator_that_names_a_dispatch_twice_or_with_a_wrong_factor_is_refused(
    config: RunConfig,
) -> None:
    with federation(config) as fed:
        rounds = Rounds(fed)
        rounds.send((1, 0))
        for arrivals, words in (
            ([Arrival(1, 1.0), Arrival(1, 0.5)], "arrives twice"),
            ([Arrival(1, 1.5)], r"must be in \(0, 1\]"),
            ([Arrival(1, 0.0)], r"must be in \(0, 1\]"),
            ([], "without an arrival"),
        ):
            with pytest.raises(TrunkRefused, match=words):
                fed.coordinator.prepare_round("test", 1, 0, arrivals)
        rounds.sent = {7: Dispatch(0, 0, "token")}
        with pytest.raises(TrunkRefused, match="a number from 1"):
            rounds.send()
