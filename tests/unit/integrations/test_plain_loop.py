"""A plain ``loss.backward()`` loop, and gradient checkpointing of every family's client."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.lora import adapter_state
from flower_split.parties.parts import model_cuts
from flower_split.split import CutLayers, set_trunk, split_model
from flower_split.split.structure.stack import find_stack
from tests.support.tiny_models import FAMILIES, padded_batch, tiny_model
from tests.support.trainer_rig import (
    ADAMW,
    STEPS,
    Run,
    assert_equal_runs,
    checkpoint,
    client_trunk,
    examples,
    padded,
    remote_client,
    run_config,
    served,
    whole_model,
)

ACCUMULATION = 2


def micro_batches() -> list[list[dict[str, Tensor]]]:
    """Per optimizer step, two micro-batches of unequal token counts."""
    rows = examples(STEPS * ACCUMULATION * 2, seed=4)
    batches = [padded("left")(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    return [batches[at : at + ACCUMULATION] for at in range(0, len(batches), ACCUMULATION)]


def tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def loop(model: PreTrainedModel, trunk: nn.Module | None) -> list[float]:
    """AdamW at a constant rate; ``trunk``: one in process to train too, or a remote one to tell."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if trunk is not None and not isinstance(trunk, RemoteTrunk):
        parameters += [p for p in trunk.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ADAMW.learning_rate, weight_decay=0.0)
    losses = []
    for step, batches in enumerate(micro_batches()):
        total = sum(tokens(batch) for batch in batches)
        for index, batch in enumerate(batches):
            if isinstance(trunk, RemoteTrunk):
                with trunk.micro_batch(
                    step,
                    index,
                    num_tokens=tokens(batch),
                    loss_denominator=total,
                    last=index + 1 == len(batches),
                ):
                    loss = model(**batch, num_items_in_batch=total).loss
            else:
                loss = model(**batch, num_items_in_batch=total).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_plain_loop_split_equals_unsplit(tmp_path: Path) -> None:
    constant = type(ADAMW)(name="adamw", learning_rate=3e-3, max_grad_norm=0.0)
    config = run_config(checkpoint(tmp_path / "model"), constant)
    whole = whole_model(config)
    client, trunk = split_model(whole, model_cuts(config))
    expected = Run(loop(whole, None), whole)
    assert_equal_runs(expected, Run(loop(client, trunk), client, trunk))
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client) as remote:
            remote.open(STEPS)
            run = Run(loop(client, remote), client)
        fed.coordinator.prepare_round("test", 1, 0)
        run.adapter.update(fed.coordinator.get_adapter())
    assert adapter_state(whole).keys() == run.adapter.keys()
    assert_equal_runs(expected, run)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_client_calls_its_trunk_once_and_has_the_same_gradients(family: str) -> None:
    client, trunk = split_model(tiny_model(family), CutLayers(1, 3))
    calls = []

    class Counting(nn.Module):
        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
        ) -> Tensor:
            calls.append(hidden_states.shape)
            return trunk(hidden_states, attention_mask, position_ids, use_cache=False)

    set_trunk(client, Counting())
    layer = find_stack(client).layers(client)[0]
    attention = next(
        m for name, m in layer.named_children() if "att" in name and list(m.children())
    )
    attention.register_forward_pre_hook(lambda *_: runs.append(1))
    runs: list[int] = []
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            client.gradient_checkpointing_enable({"use_reentrant": False})
        client.zero_grad()
        client(**padded_batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in client.named_parameters()})
        assert len(calls) == 1 + checkpointed
    assert len(runs) == 3  # once, and then once more in the backward
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
