"""A client whose bottom trains nothing: the trunk must still get its backward, in the real loop."""

import torch

from flower_split.config import LoraConfigs, LoraPartConfig, OptimizerConfig, RunConfig, TrainConfig
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, set_trunk, split_model
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from tests.support.loopback import FINGERPRINT, coordinator, plan, remote, served
from tests.support.tiny_models import padded_batch, tiny_model

CUTS = CutLayers(1, 3)


def test_train_round_with_nothing_to_train_in_the_bottom_still_trains_the_trunk() -> None:
    client, trunk = split_model(tiny_model("llama"), CUTS)
    attach_lora(client, CUTS, {"top": LoraPartConfig(r=2)}, seed=0)
    attach_lora(trunk, CUTS, {"trunk": LoraPartConfig(r=2)}, seed=0)
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1)
    compute = TrunkCompute(trunk, optimizer, seed=0)
    engine = TrunkEngine(
        compute, mode="joint", hidden_size=32, fingerprint=FINGERPRINT, activation_bytes=1 << 26
    )
    before = compute.adapter()
    config = RunConfig(
        lora=LoraConfigs(bottom=LoraPartConfig(r=0)),
        train=TrainConfig(local_steps=2, gradient_accumulation_steps=2, optimizer=optimizer),
    )
    position = RoundPosition(server_round=1, num_server_rounds=1, num_steps=2, partition_id=0)
    with served(engine) as port, coordinator(port) as control:
        control.begin_round(plan(window_seconds=10.0, steps_per_round=2))
        with remote(port) as wire:
            wire.open(2)
            set_trunk(client, wire)
            batches = iter([padded_batch(seed) for seed in range(4)])
            train_round(client, batches, config, position, wire)
            assert wire.wait_version(2) == 2
        report = control.prepare_round("e", 1, 0)
    assert report.optimizer_steps == 2 and report.slots[0].contributions == 4
    after = compute.adapter()
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)
