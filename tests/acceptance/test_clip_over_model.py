"""Gradients clipped by one norm over bottom, trunk and top, as the unsplit model clips them.

The reference is the unsplit model with ``torch.nn.utils.clip_grad_norm_`` over all its LoRA.
"""

from dataclasses import replace

import pytest
import torch

from flower_split.config import OptimizerConfig
from flower_split.lora import adapter_state
from flower_split.training.optimizers import LearningRate, make_optimizer
from tests.acceptance.federation import (
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

STEPS = 4
BATCHES = [make_batch(2, [9, 4 + step], seed=step) for step in range(STEPS)]
ADAMW = OptimizerConfig(name="adamw", learning_rate=3e-3, max_grad_norm=0.3, schedule="cosine")
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, max_grad_norm=0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def clipping_config(checkpoint, optimizer, over):
    config = make_config(
        checkpoint, optimizer=optimizer, local_steps=STEPS, max_grad_norm_over="part"
    )
    config = replace(config, trunk=replace(config.trunk, optimizer=optimizer))
    return replace(config, train=replace(config.train, max_grad_norm_over=over))


def split(config):
    """The adapter after one client's round, and the one it began with."""
    with federation(config) as run:
        client0 = perturbed(adapter_state(run.client_model(0)), 7)
        trunk0 = perturbed(run.engine.adapter(), 8)
        run.load_trunk(trunk0)
        returned, _, _ = run.train(client0, {0: BATCHES}, num_steps=STEPS, steps_per_round=STEPS)
        return {**returned[0], **run.engine.adapter()}, {**client0, **trunk0}


def unsplit(config, start):
    """The unsplit model's steps on the same batches; every step is clipped by much."""
    whole = Whole(config)
    whole.load(start)
    parameters = [p for p in whole.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.train.optimizer)
    rate = LearningRate(config.train.optimizer, STEPS)
    for step, batch in enumerate(BATCHES):
        logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        ).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.optimizer.max_grad_norm)
        assert norm > 2 * config.train.optimizer.max_grad_norm
        rate.apply(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return adapter_state(whole.model)


def distance(found, expected, start):
    """‖found − expected‖ / ‖expected − start‖ over the whole adapter."""
    off = sum(float((found[n] - expected[n]).double().square().sum()) for n in expected)
    moved = sum(float((start[n] - expected[n]).double().square().sum()) for n in expected)
    return (off / moved) ** 0.5


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("over", ["model", "auto"])
def test_one_client_clipped_over_the_model_is_the_unsplit_model(checkpoint, optimizer, over):
    config = clipping_config(checkpoint, optimizer, over)
    found, start = split(config)
    assert distance(found, unsplit(config, start), start) < 1e-5


def test_one_client_clipped_per_part_is_not_the_unsplit_model(checkpoint):
    config = clipping_config(checkpoint, SGD, "part")
    found, start = split(config)
    assert distance(found, unsplit(config, start), start) > 0.05
