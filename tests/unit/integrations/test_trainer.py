"""transformers' Trainer on the split client equals the same Trainer on the unsplit model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

from flower_split.config import OptimizerConfig, RunConfig
from flower_split.errors import ConfigError, SplitError, TrunkError
from flower_split.integrations.trainer import connect_trainer
from flower_split.parties.parts import model_cuts
from flower_split.split import set_trunk, split_model
from tests.support.sampling import sampled
from tests.support.trainer_rig import (
    ADAMW,
    SGD,
    STEPS,
    RecordingTrainer,
    Run,
    arguments,
    assert_equal_runs,
    checkpoint,
    client_trunk,
    examples,
    in_process,
    over_grpc,
    packed,
    padded,
    remote_client,
    run_config,
    served,
    train,
    unsplit,
    whole_model,
)

WAYS = {"in process": in_process, "over gRPC": over_grpc}
CASES: dict[str, tuple[Any, dict[str, object]]] = {
    "right padding": (padded("right"), {}),
    "left padding": (padded("left"), {}),
    "left padding, position ids": (padded("left", positions=True), {}),
    "packed": (packed, {"per_device_train_batch_size": 3}),
    "accumulation": (padded("right"), {"gradient_accumulation_steps": 3}),
    "checkpointing": (padded("right"), {"gradient_checkpointing": True}),
    "accumulation and checkpointing": (
        padded("left"),
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case", sampled(CASES, "left padding, position ids", "accumulation and checkpointing")
)
def test_trainer_split_equals_unsplit(tmp_path: Path, way: str, case: str) -> None:
    collate, changes = CASES[case]
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    expected = unsplit(config, tmp_path, collate, **changes)
    assert_equal_runs(expected, WAYS[way](config, tmp_path, collate, **changes))
    assert expected.losses[-1] != expected.losses[0]
    assert len(expected.losses) == STEPS * int(changes.get("gradient_accumulation_steps", 1))


@pytest.mark.parametrize("way", WAYS)
def test_trainer_with_adamw_on_both_sides_equals_unsplit(tmp_path: Path, way: str) -> None:
    config = run_config(checkpoint(tmp_path / "model"), ADAMW)
    expected = unsplit(config, tmp_path, padded("right"), gradient_accumulation_steps=2)
    found = WAYS[way](config, tmp_path, padded("right"), gradient_accumulation_steps=2)
    assert_equal_runs(expected, found)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_trainer_at_its_default_max_grad_norm_equals_unsplit(
    tmp_path: Path, optimizer: OptimizerConfig
) -> None:
    """SGD is off by far, and AdamW by little, where each part clips by itself."""
    config = clipping_run(tmp_path, replace(optimizer, max_grad_norm=1.0))
    default = TrainingArguments("out").max_grad_norm
    changes = {"gradient_accumulation_steps": 2, "max_grad_norm": default}
    expected = unsplit(config, tmp_path, padded("right"), **changes)
    found = over_grpc(config, tmp_path, padded("right"), **changes)
    assert_equal_runs(expected, found)
    assert found.report.optimizer_steps == STEPS


def test_trainer_with_another_max_grad_norm_than_the_round_is_refused(tmp_path: Path) -> None:
    config = clipping_run(tmp_path, replace(SGD, max_grad_norm=1.0))
    with pytest.raises(ConfigError, match="to 1; the trainer's max_grad_norm is 0.5"):
        over_grpc(config, tmp_path, padded("right"), max_grad_norm=0.5)


def clipping_run(path: Path, optimizer: OptimizerConfig) -> RunConfig:
    """A run whose clients and trunk clip by one norm over the whole model."""
    config = run_config(checkpoint(path / "model"), optimizer)
    over_model = replace(config.train, optimizer=optimizer, max_grad_norm_over="model")
    return replace(config, train=over_model)


@pytest.mark.parametrize("step_every", ["local-step", "server-round"])
def test_trainer_over_grpc_steps_the_trunk_once_per_window(tmp_path: Path, step_every: str) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD, step_every=step_every)
    run = over_grpc(config, tmp_path, padded("right"), gradient_accumulation_steps=2)
    assert run.report.optimizer_steps == (STEPS if step_every == "local-step" else 1)
    [slot] = run.report.slots
    assert slot.completed
    assert slot.contributions == 2 * STEPS


@pytest.mark.parametrize(("way", "tolerance"), [("in process", 1e-6), ("over gRPC", 2e-2)])
def test_trainer_with_bf16_autocast_equals_unsplit(
    tmp_path: Path, way: str, tolerance: float
) -> None:
    # A remote trunk computes in its own dtype, here fp32, where the unsplit model rounds to bf16.
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    expected = unsplit(config, tmp_path, padded("right"), bf16=True)
    full = unsplit(config, tmp_path, padded("right"))
    found = WAYS[way](config, tmp_path, padded("right"), bf16=True)
    torch.testing.assert_close(
        torch.tensor(found.losses), torch.tensor(expected.losses), rtol=tolerance, atol=tolerance
    )
    assert expected.losses != full.losses


def test_trainer_with_dropout_in_process_draws_as_the_unsplit_model(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD, dropout=0.2)
    expected = unsplit(config, tmp_path, padded("right"))
    assert_equal_runs(expected, in_process(config, tmp_path, padded("right")))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_with_dropout_over_grpc_repeats_whatever_is_recomputed(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD, dropout=0.2)
    run = over_grpc(config, tmp_path, padded("right"))
    again = over_grpc(config, tmp_path, padded("right"))
    assert run.losses == again.losses
    assert all(torch.equal(run.adapter[name], again.adapter[name]) for name in run.adapter)
    small = replace(config, trunk=replace(config.trunk, activation_memory=2**14 / 2**30))
    recomputed = over_grpc(small, tmp_path, padded("right"), gradient_checkpointing=True)
    assert_equal_runs(run, recomputed)
    without = over_grpc(run_config(checkpoint(tmp_path / "model"), SGD), tmp_path, padded("right"))
    assert without.losses != run.losses


def test_trainer_that_evaluates_between_steps_trains_the_same(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD, max_evaluations=STEPS)
    found: dict[str, list[float]] = {}
    model = whole_model(config)
    for way in ("unsplit", "over gRPC"):
        with served(config) as fed:
            subject = model if way == "unsplit" else remote_client(fed)
            trainer = RecordingTrainer(
                model=subject,
                args=TrainingArguments(
                    **arguments(tmp_path, SGD, eval_strategy="steps", eval_steps=1)
                ),
                train_dataset=examples(24),
                eval_dataset=examples(5, seed=9),
                data_collator=padded("right"),
            )
            if way == "over gRPC":
                with client_trunk(fed, subject):
                    connect_trainer(trainer)
                    trainer.train()
            else:
                trainer.train()
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found[way] = trainer.losses + logged
        assert len(logged) == STEPS
    torch.testing.assert_close(
        torch.tensor(found["over gRPC"]), torch.tensor(found["unsplit"]), rtol=1e-6, atol=1e-6
    )


def test_connect_trainer_refuses_a_trunk_in_process(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    client, _ = split_model(whole_model(config), model_cuts(config))
    trainer = train(client, tmp_path, SGD, padded("right"))
    with pytest.raises(SplitError, match="LocalTrunkOptimizer"):
        connect_trainer(trainer)


def test_connect_trainer_refuses_an_unknown_window_and_a_second_training(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    with served(config) as fed:
        client = remote_client(fed)
        with client_trunk(fed, client):
            trainer = train(client, tmp_path, SGD, padded("right"))
            with pytest.raises(ConfigError, match="step_every"):
                connect_trainer(trainer, step_every="sometimes")
            connect_trainer(trainer)
            trainer.train()
            with pytest.raises(TrunkError, match="new RemoteTrunk"):
                trainer.train()


def test_connect_trainer_goes_on_with_the_trunk_of_the_next_round(tmp_path: Path) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    with served(config) as fed:
        client = remote_client(fed)
        trunk = client_trunk(fed, client)
        trainer = train(client, tmp_path, SGD, padded("right"))
        connect_trainer(trainer)
        with trunk:
            trainer.train()
        fed.coordinator.prepare_round("test", 1, 0)
        fed.coordinator.commit_round("test", 1, 0)
        fed.begin([0], server_round=2, steps_per_round=STEPS)
        trunk = fed.remote(0)
        set_trunk(client, trunk)
        with trunk:
            trainer.train()
        assert fed.coordinator.prepare_round("test", 2, 0).version == 2 * STEPS


class StopAfterTwo(TrainerCallback):
    """Ends training early, as EarlyStoppingCallback does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 2


class Once(IterableDataset):  # type: ignore[type-arg]
    """Four examples, the first time it is asked; two steps' worth of the four that are planned."""

    def __init__(self) -> None:
        self.rows = examples(4)

    def __iter__(self) -> Iterator[Any]:
        rows, self.rows = self.rows, []
        return iter(rows)


# Otherwise accelerate raises where an iterable ends, before the trainer can stop.
ITERABLE: dict[str, object] = {"accelerator_config": {"dispatch_batches": False}}


def stop_early(trainer: RecordingTrainer, way: str) -> None:
    if way == "callback":
        trainer.add_callback(StopAfterTwo())
    else:
        trainer.train_dataset = Once()


@pytest.mark.filterwarnings("ignore:There seems not to be a single sample")
@pytest.mark.parametrize("step_every", ["local-step", "server-round"])
@pytest.mark.parametrize("way", ["callback", "short data"])
def test_a_trainer_that_stops_early_keeps_its_steps_on_the_trunk(
    tmp_path: Path, way: str, step_every: str
) -> None:
    config = run_config(checkpoint(tmp_path / "model"), SGD, step_every=step_every)
    with served(config) as fed:
        client = remote_client(fed)
        before = fed.coordinator.get_adapter()
        with client_trunk(fed, client):
            trainer = train(client, tmp_path, SGD, padded("right"), **ITERABLE)
            stop_early(trainer, way)
            connect_trainer(trainer, step_every=step_every)
            trainer.train()
        report = fed.coordinator.prepare_round("test", 1, 0)
        fed.coordinator.commit_round("test", 1, 0)
        found = Run(trainer.losses, client)
        found.adapter.update(after := fed.coordinator.get_adapter())
    assert trainer.state.global_step == 2 and len(trainer.losses) == 2
    assert [(item.completed, item.contributions) for item in report.slots] == [(True, 2)]
    if step_every == "server-round":  # one step for both: another model than the unsplit one
        assert report.optimizer_steps == 1
        assert all(not torch.equal(after[name], before[name]) for name in after)
        return
    assert report.optimizer_steps == 2
    whole = whole_model(config)
    reference = train(whole, tmp_path, SGD, padded("right"), **ITERABLE)
    stop_early(reference, way)
    reference.train()
    assert_equal_runs(Run(reference.losses, whole), found)
