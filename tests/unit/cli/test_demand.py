"""Memory and arithmetic of runs and baselines, against torch's own counter on a real step."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flower_split.cli.plan.demand import demand_of
from flower_split.config import RunConfig
from flower_split.experiments.baselines import BASELINES
from tests.acceptance.federation import Whole, make_batch, make_config, write_checkpoint

ROWS, POSITIONS, WIDTH, CLIENTS = 2, 7, 32, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = write_checkpoint(tmp_path_factory.mktemp("demand") / "model")
    made = make_config(path, batch_size=ROWS, sequence_length=POSITIONS)
    return replace(made, num_clients=CLIENTS)


def counted(config: RunConfig) -> int:
    """Operations of a real step of the unsplit model with its LoRA."""
    whole, batch = Whole(config).model, make_batch(ROWS, [POSITIONS] * ROWS, seed=1)
    trained = [p for p in whole.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as counter:
        loss = whole(**batch, use_cache=False).loss
        torch.autograd.grad(loss, trained)
    return int(counter.get_total_flops())


def test_a_baselines_arithmetic_is_what_torch_counts_in_a_step(config: RunConfig) -> None:
    alone, central = (demand_of(config, name) for name in ("alone", "central"))
    assert alone is not None and central is not None
    assert alone.client_flops == counted(config)
    assert central.client_flops == CLIENTS * alone.client_flops
    assert alone.trunk_bytes == alone.trunk_flops == 0


def test_a_split_divides_the_arithmetic_and_spares_the_client_memory(config: RunConfig) -> None:
    ours, whole, turns = (demand_of(config, name) for name in ("", "federated", "sequential"))
    assert ours is not None and whole is not None and turns is not None
    # Two of six layers are the trunk's; nothing is computed twice, and nothing twice as often.
    assert ours.client_flops + ours.trunk_flops == whole.client_flops
    assert ours.client_bytes < whole.client_bytes
    assert turns.client_flops == ours.client_flops and turns.trunk_flops == ours.trunk_flops
    assert turns.trunk_bytes < ours.trunk_bytes  # one client's activations instead of three


def test_what_crosses_is_planned_for_whoever_has_a_trunk(config: RunConfig) -> None:
    made = {
        name: demand_of(config, name) for name in ("", "splitfed-v1", "sequential", "federated")
    }
    assert all(made.values())
    planned = {name: demand.wire_bytes for name, demand in made.items() if demand is not None}
    assert planned["federated"] == 0
    assert planned[""] == planned["splitfed-v1"] == planned["sequential"]
    # Two activations and two gradients of fp32, of width 32; frames and masks are a little more.
    steps = CLIENTS * config.num_server_rounds * config.train.local_steps
    payload = steps * 4 * ROWS * POSITIONS * WIDTH * 4
    assert payload * 0.85 < planned[""] < payload * 1.6  # zeros of last positions do not travel
    v1, ours = made["splitfed-v1"], made[""]
    assert v1 is not None and ours is not None
    assert v1.trunk_bytes > ours.trunk_bytes  # a copy for each client
    assert v1.client_bytes == ours.client_bytes


def test_accumulation_counts_every_micro_batch(config: RunConfig) -> None:
    train = replace(config.train, gradient_accumulation_steps=4)
    four, one = demand_of(replace(config, train=train), "alone"), demand_of(config, "alone")
    assert four is not None and one is not None
    assert four.client_flops == 4 * one.client_flops
    assert four.client_bytes == one.client_bytes  # one after the other


def test_what_the_plan_cannot_tell_is_left_out(config: RunConfig) -> None:
    quantised = replace(config, model=replace(config.model, quantization="bnb-8bit"))
    assert demand_of(quantised, "") is None
    assert {name for name, made in BASELINES.items() if made.whole_model} == {
        "central",
        "alone",
        "federated",
    }
