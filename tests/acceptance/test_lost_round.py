"""A round that was lost halfway leaves nothing behind in a client that serves the next attempt."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flower_split.config import parse_run_config
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from tests.support.tiny_app import make_data, make_model, tiny_config

PLACE = RoundPosition(server_round=1, num_server_rounds=1, num_steps=2, partition_id=0)


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        tokens = torch.randint(1, 200, (2, 8), generator=generator)
        mask = torch.ones_like(tokens)
        yield {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def test_attempt_after_a_lost_one_gives_the_same_adapter(tmp_path):
    values = tiny_config(make_model(tmp_path / "model"), make_data(tmp_path / "data", 1))
    config = parse_run_config({**values, "train.gradient-accumulation-steps": 2})
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="float32")
    attach_lora(model, model_cuts(config), all_parts(config), seed=0)
    start = adapter_state(model)
    train_round(model, batches(), config, PLACE, None)
    expected = adapter_state(model)
    assert any(not torch.equal(start[name], expected[name]) for name in start)

    def break_off(module, args):
        calls.append(None)
        if len(calls) == 4:  # the second step's second micro-batch, after the first one's gradient
            raise ConnectionError("the trunk has gone")

    calls: list[None] = []
    load_adapter_state(model, start)
    hook = model.register_forward_pre_hook(break_off)
    with pytest.raises(ConnectionError):
        train_round(model, batches(), config, PLACE, None)
    hook.remove()
    assert any(parameter.grad is not None for parameter in model.parameters())
    load_adapter_state(model, start)
    train_round(model, batches(), config, PLACE, None)
    again = adapter_state(model)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
