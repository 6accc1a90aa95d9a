"""Clients that share their gradients train as the unsplit model does on everybody's data together.

Four clients with unequal numbers of tokens, two micro-batches a step, AdamW, one norm over the whole
model, cosine with warm-up, 20 optimizer steps, through real gRPC. The reference is the unsplit model.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.config import ModelConfig, OptimizerConfig, TrainConfig
from flower_split.lora import adapter_state, load_adapter_state, lora_scales
from flower_split.lora.state import adapter_parameters
from flower_split.split import set_trunk
from flower_split.training.measures import RoundPosition
from flower_split.training.optimizers import LearningRate, PartOptimizer, make_optimizer
from flower_split.training.round import train_round
from tests.acceptance.federation import (
    VOCAB_SIZE,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

STEPS = 20
ADAMW = OptimizerConfig(
    name="adamw", learning_rate=3e-3, max_grad_norm=0.3, schedule="cosine", warmup_ratio=0.1
)
SLOTS = (0, 1, 2, 3)
LENGTHS = ([3], [9, 4], [12, 12, 2, 7], [20, 18, 20])


def micro_batches(slot):
    """Two for each step, of unequal lengths."""
    return [
        make_batch(len(LENGTHS[slot]), [n + (index % 2) for n in LENGTHS[slot]], 100 * slot + index)
        for index in range(2 * STEPS)
    ]


BATCHES = {slot: micro_batches(slot) for slot in SLOTS}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model that computes nothing in fp32 by itself, as Llama's norms do."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=32,
        n_embd=32,
        n_layer=6,
        n_head=4,
        initializer_range=0.2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def shared_config(path, dtype="float32", rounds=1):
    train = TrainConfig(
        local_steps=STEPS // rounds,
        gradient_accumulation_steps=2,
        optimizer=ADAMW,
        sync="gradients",
        max_grad_norm_over="model",
    )
    config = make_config(path)
    return replace(
        config,
        num_server_rounds=rounds,
        model=ModelConfig(name=str(path), first_cut=2, second_cut=4, dtype=dtype),
        train=train,
        trunk=replace(config.trunk, optimizer=ADAMW),
        strategy=replace(config.strategy, aggregator="fedit"),
    )


def parameters(model):
    """What trains, in its own dtype."""
    return {name: p.detach().clone() for name, p in sorted(adapter_parameters(model))}


def one_round(run, server_round, adapter, kept):
    """Train all clients for a round; return their adapters and optimizer states, by slot."""
    config, steps = run.config, run.config.train.local_steps
    run.begin(SLOTS, server_round=server_round, steps_per_round=steps)

    def client(slot):
        model = run.client_model(slot)
        load_adapter_state(model, adapter)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = PartOptimizer(list(named.values()), config.train.optimizer, STEPS)
        optimizer.load_state(list(named), kept.get(slot, {}))
        position = RoundPosition(
            server_round=server_round,
            num_server_rounds=config.num_server_rounds,
            num_steps=steps,
            partition_id=slot,
        )
        first = 2 * position.first_step
        with run.remote(slot) as trunk:
            set_trunk(model, trunk)
            trunk.open(steps)
            batches = iter(BATCHES[slot][first:])
            result = train_round(model, batches, config, position, trunk, optimizers=[optimizer])
        assert min(step.grad_norm for step in result.steps) > 2 * ADAMW.max_grad_norm
        return parameters(model), optimizer.state(list(named))

    for slot in SLOTS:
        run.client_model(slot)
    with ThreadPoolExecutor(len(SLOTS)) as pool:
        done = dict(zip(SLOTS, pool.map(client, SLOTS), strict=True))
    run.coordinator.prepare_round("test", server_round, 0)
    run.coordinator.commit_round("test", server_round, 0)
    return {s: state for s, (state, _) in done.items()}, {s: kept for s, (_, kept) in done.items()}


def federated(config):
    """The adapter after all rounds, and the one at the beginning."""
    with federation(config) as run:
        client0 = perturbed(adapter_state(run.client_model(0)), 7)
        trunk0 = perturbed(run.engine.adapter(), 8)
        run.load_trunk(trunk0)
        aggregator = AdapterAggregator("fedit", lora_scales(run.client_model(0)))
        aggregator.init(client0)
        adapter, kept = client0, {}
        for server_round in range(1, config.num_server_rounds + 1):
            returned, kept = one_round(run, server_round, adapter, kept)
            for slot in SLOTS[1:]:  # they are one client, optimizer included
                assert_same_bits(returned[slot], returned[0])
                assert_same_bits(kept[slot], kept[0])
            if config.model.dtype == "float32":  # adapters are fp32 between rounds
                tokens = {slot: 1.0 + slot for slot in SLOTS}
                aggregator.aggregate(
                    [AdapterUpdate(s, adapter, returned[s], tokens[s]) for s in SLOTS]
                )
                adapter = aggregator.distribute()
                assert_same_bits(adapter, returned[0])  # the identity
        trunk = parameters(run.engine.compute.trunk)
        return {**returned[0], **trunk}, {**client0, **trunk0}


def central(config, start):
    """The unsplit model on everybody's data, with torch's own clipping."""
    whole = Whole(config)
    whole.load(start)
    trained = [p for p in whole.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, ADAMW)
    rate = LearningRate(ADAMW, STEPS)
    for step in range(STEPS):
        batches = [b for slot in SLOTS for b in BATCHES[slot][2 * step : 2 * step + 2]]
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for batch in batches:
            logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, ADAMW.max_grad_norm)
        rate.apply(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return parameters(whole.model)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def distance(found, expected, start):
    """‖found − expected‖ / ‖expected − start‖ over the whole adapter."""
    assert found.keys() == expected.keys()
    off = sum(float((found[n].double() - expected[n]).square().sum()) for n in expected)
    moved = sum(float((start[n] - expected[n]).double().square().sum()) for n in expected)
    return (off / moved) ** 0.5


def test_twenty_steps_in_fp32_over_four_rounds_are_those_of_the_unsplit_model(llama):
    """Between rounds each client's optimizer goes on, and aggregation changes nothing."""
    config = shared_config(llama, rounds=4)
    found, start = federated(config)
    assert distance(found, central(config, start), start) < 1e-5


def test_twenty_steps_in_fp64_are_those_of_the_unsplit_model(gpt2):
    config = shared_config(gpt2, "float64")
    found, start = federated(config)
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert distance(found, central(config, start), start) < 1e-10
