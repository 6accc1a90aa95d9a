"""Epochs are passes over the data: each example once, the last optimizer step is a short one."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from flower_split.client.client import epoch_micro_batches, planned_steps
from flower_split.data import Example, batches
from flower_split.lora import adapter_state, load_adapter_state
from flower_split.split import set_trunk
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from tests.acceptance.federation import SGD, Whole, federation, make_config, write_checkpoint

COUNT, SIZE, ACCUMULATION, EPOCHS = 9, 2, 4, 2
# The label tokens of example i, which has i + 2 tokens, the first of which is not predicted.
TOKENS = [i + 1 for i in range(COUNT)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(checkpoint):
    return make_config(
        checkpoint,
        local_steps=0,
        local_epochs=EPOCHS,
        batch_size=SIZE,
        gradient_accumulation_steps=ACCUMULATION,
    )


def examples():
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(COUNT):
        ids = torch.randint(1, 64, (index + 2,), generator=generator).tolist()
        made.append(Example(ids, list(ids)))
    return made


def micro_batches():
    return batches(examples(), SIZE, seed=11, pad_token_id=0)


def place(config):
    return RoundPosition(
        server_round=1,
        num_server_rounds=1,
        num_steps=planned_steps(config, COUNT),
        partition_id=0,
        epoch_micro_batches=epoch_micro_batches(config, COUNT),
    )


def test_nine_examples_are_used_once_per_epoch_and_the_last_step_is_short(config):
    # 9 examples are 5 micro-batches: an epoch's steps take 4 of them (8 examples) and 1 (1 example)
    assert planned_steps(config, COUNT) == 4
    where = place(config)
    assert [where.micro_batches_in(step, ACCUMULATION) for step in range(4)] == [4, 1, 4, 1]
    whole = Whole(config)
    start = adapter_state(whole.model)
    result = train_round(whole.model, micro_batches(), config, where, None)
    assert result.num_examples == COUNT * EPOCHS
    tokens = [step.num_tokens for step in result.steps]
    assert tokens[0] + tokens[1] == tokens[2] + tokens[3] == sum(TOKENS) == 45
    trained = adapter_state(whole.model)

    # By hand: SGD on the mean token loss of 8 examples, then of the ninth, in the same order.
    load_adapter_state(whole.model, start)
    parameters = [p for p in whole.model.parameters() if p.requires_grad]
    stream = micro_batches()
    for count in (4, 1, 4, 1):
        taken = list(itertools.islice(stream, count))
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in taken)
        for batch in taken:
            logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / total).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= SGD.learning_rate * parameter.grad
                parameter.grad = None
    by_hand = adapter_state(whole.model)
    for name in trained:
        torch.testing.assert_close(trained[name], by_hand[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step_every", ["local-step", "server-round", "contribution"])
def test_epochs_with_a_trunk_end_where_the_plan_says(config, step_every):
    config = replace(config, trunk=replace(config.trunk, step_every=step_every))
    with federation(config) as run:
        run.begin([0])
        model = run.client_model(0)
        trunk = run.remote(0)
        set_trunk(model, trunk)
        where = place(config)
        trunk.open(where.num_steps)
        result = train_round(model, micro_batches(), config, where, trunk)
        trunk.close()
        report = run.coordinator.prepare_round("test", 1, 0)
    assert result.num_examples == COUNT * EPOCHS
    [slot] = report.slots
    assert slot.completed and slot.contributions == math.ceil(COUNT / SIZE) * EPOCHS == 10
    assert slot.num_tokens == sum(TOKENS) * EPOCHS
