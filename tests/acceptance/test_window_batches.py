"""Federations whose clients' micro-batches are computed together, through real gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flower_split.config import RunConfig
from flower_split.lora import adapter_state
from flower_split.protocol.values import RoundReport
from flower_split.training.loss import Batch
from tests.acceptance.federation import (
    SGD,
    Whole,
    federation,
    make_batch,
    make_config,
    perturbed,
    write_checkpoint,
)

BATCHES = {
    0: make_batch(1, [3], seed=0),
    1: make_batch(2, [9, 4], seed=1),
    2: make_batch(4, [12, 12, 2, 7], seed=2),
    3: make_batch(3, [20, 18, 20], seed=3),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def together(checkpoint: Path, **train: object) -> RunConfig:
    config = make_config(checkpoint, **train)
    return replace(config, trunk=replace(config.trunk, window_batches="on"))


def rows(batch: Batch, count: int) -> list[Batch]:
    """The batch as micro-batches of ``count`` rows."""
    starts = range(0, len(batch["input_ids"]), count)
    return [{name: t[start : start + count] for name, t in batch.items()} for start in starts]


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ over tensors."""
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
        for name in expected
    )


def one_round(
    config: RunConfig,
    batches: Mapping[int, Sequence[Batch]],
    *,
    order: Sequence[int] | None = None,
    num_steps: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Tensor], RoundReport]:
    """Everybody's adapters after one round, the unsplit model's after one step, and the report."""
    with federation(config) as run:
        client0 = perturbed(adapter_state(run.client_model(0)), 7)
        trunk0 = perturbed(run.engine.adapter(), 8)
        run.load_trunk(trunk0)
        returned, results, report = run.train(client0, batches, order=order, num_steps=num_steps)
        tokens = {slot: float(result.num_tokens) for slot, result in results.items()}
        federated = {**run.aggregate("fedit", client0, returned, tokens), **run.engine.adapter()}
    reference = Whole(config)
    reference.load(client0, trunk0)
    central = reference.sgd_step([b for many in batches.values() for b in many], SGD.learning_rate)
    return federated, central, report


def test_one_round_of_unequal_clients_in_one_batch_equals_one_central_step(
    checkpoint: Path,
) -> None:
    batches = {slot: [batch] for slot, batch in BATCHES.items()}
    federated, central, report = one_round(together(checkpoint), batches)
    assert federated.keys() == central.keys()
    assert relative_error(federated, central) < 1e-5
    assert (report.batches.batches, report.batches.partial) == (1, 0)
    assert report.optimizer_steps == 1


def test_round_of_micro_batches_is_the_central_step_and_one_hash_over_two_orders_of_arrival(
    checkpoint: Path,
) -> None:
    config = together(checkpoint, gradient_accumulation_steps=2)
    batches = {slot: rows(BATCHES[slot], 2)[:2] for slot in (2, 3)}
    batches[1] = rows(BATCHES[1], 1)
    found = [one_round(config, batches, order=order) for order in ((1, 2, 3), (3, 1, 2))]
    for federated, central, report in found:
        assert relative_error(federated, central) < 1e-5
        assert report.batches.batches == 2
    assert found[0][2].digest == found[1][2].digest
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


def test_several_steps_with_one_norm_over_the_model_have_one_hash_over_two_orders(
    checkpoint: Path,
) -> None:
    optimizer = replace(SGD, max_grad_norm=0.1)
    config = together(checkpoint, local_steps=3)
    config = replace(
        config,
        train=replace(config.train, optimizer=optimizer, max_grad_norm_over="model"),
        trunk=replace(config.trunk, optimizer=optimizer),
    )
    batches = {slot: [batch] * 3 for slot, batch in BATCHES.items()}
    reports = [
        one_round(config, batches, order=order, num_steps=3)[2]
        for order in ((0, 1, 2, 3), (2, 3, 1, 0))
    ]
    assert [report.optimizer_steps for report in reports] == [3, 3]
    assert reports[0].digest == reports[1].digest
