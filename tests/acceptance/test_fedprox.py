"""FedProx's term on the clients: against autograd's gradient of it, and in a whole run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flower_split.lora import adapter_state
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition
from flower_split.training.round import train_round
from tests.acceptance.federation import (
    SGD,
    Whole,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)
from tests.support.composition import CLIENTS, Job
from tests.support.local_grid import TrunkHere
from tests.support.tiny_app import make_data, make_model

MU, RATE, STEPS = 0.7, 0.3, 3


def reference(whole: Whole, start: dict[str, Tensor], batches: list[Batch]) -> dict[str, Tensor]:
    """SGD on loss + μ/2 ‖w − w₀‖², the term differentiated by autograd."""
    whole.load(start)
    parameters = [p for p in whole.model.parameters() if p.requires_grad]
    began = [p.detach().clone() for p in parameters]
    for batch in batches:
        logits = whole.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        term = sum(((p - w) ** 2).sum() for p, w in zip(parameters, began, strict=True))
        gradients = torch.autograd.grad(loss + MU / 2 * term, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
    return adapter_state(whole.model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_round_with_mu_follows_the_gradient_of_the_proximal_term(
    tmp_path: Path, accumulate: int
) -> None:
    config = make_config(
        write_checkpoint(tmp_path),
        local_steps=STEPS,
        gradient_accumulation_steps=accumulate,
        optimizer=dataclasses.replace(SGD, learning_rate=RATE),
    )
    whole = Whole(config)
    start = perturbed(adapter_state(whole.model), seed=1)
    # Two micro-batches of equal length are one batch of twice the rows.
    halves = [make_batch(2, [7, 7], seed) for seed in range(STEPS * accumulate)]
    joined = [
        {key: torch.cat([b[key] for b in halves[i : i + accumulate]]) for key in halves[0]}
        for i in range(0, len(halves), accumulate)
    ]
    expected = reference(whole, start, joined)
    whole.load(start)
    position = RoundPosition(server_round=1, num_server_rounds=1, num_steps=STEPS, partition_id=0)
    train_round(whole.model, iter(halves), config, position, None, proximal_mu=MU)
    found = adapter_state(whole.model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=2e-6), name
    moved = max(float((expected[n] - start[n]).abs().max()) for n in start)
    assert moved > 1e-2


def test_run_with_fedprox_pulls_the_second_step_back_by_mu_times_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    job = Job(tmp_path, make_model(tmp_path / "model"), make_data(tmp_path / "data", CLIENTS))

    def update(name: str, steps: int, mu: float, ours: float = 0.0) -> list[dict[str, np.ndarray]]:
        outcome = job.run(
            name,
            mode="frozen",  # so that nothing but the term differs between the runs
            num_server_rounds=1,
            train__local_steps=steps,
            train__proximal_mu=ours,
            strategy__name="fedprox" if mu else "fedavg",
            strategy__options=f"proximal-mu={mu}" if mu else "",
        )
        (items,) = outcome.grid.rounds()
        return [{n: i.returned[n].astype(np.float64) - i.sent[n] for n in i.sent} for i in items]

    one, two, pulled = update("one", 1, 0.0), update("two", 2, 0.0), update("pulled", 2, 0.4)
    by_key = update("by-key", 2, 0.0, ours=0.4)  # for any strategy, by run config
    for client in range(CLIENTS):
        for name, first in one[client].items():
            # w₂ = w₁ − η (g(w₁) + μ (w₁ − w₀)), with η = 0.5
            expected = two[client][name] - 0.5 * 0.4 * first
            assert np.abs(pulled[client][name] - expected).max() <= 1e-6
            assert np.array_equal(by_key[client][name], pulled[client][name])
        assert max(np.abs(first).max() for first in one[client].values()) > 1e-3
