"""A tiny model on disk, data, and one trainer run three ways: unsplit, in process, over gRPC."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from flower_split.config import LoraConfigs, LoraPartConfig, OptimizerConfig, RunConfig
from flower_split.integrations.trainer import LocalTrunkOptimizer, connect_trainer
from flower_split.lora import adapter_state
from flower_split.parties.parts import model_cuts
from flower_split.split import set_trunk, split_model
from tests.acceptance.federation import (
    Federation,
    Whole,
    federation,
    make_config,
    perturbed,
    write_checkpoint,
)

VOCAB_SIZE = 64
STEPS = 4

Inputs = dict[str, Tensor]


def checkpoint(path: Path) -> Path:
    return write_checkpoint(path)


def run_config(
    path: Path, optimizer: OptimizerConfig, *, dropout: float = 0.0, **trunk: object
) -> RunConfig:
    """LoRA of different rank and scale on every part; client and trunk train alike."""
    config = make_config(path)
    parts = {
        name: replace(getattr(config.lora, name), dropout=dropout)
        for name in ("bottom", "trunk", "top")
    }
    return replace(
        config,
        lora=LoraConfigs(**parts),
        trunk=replace(config.trunk, optimizer=optimizer, **trunk),
    )


def examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of unequal length; the first few tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, 4, (1,), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def padded(side: str, *, positions: bool = False) -> Any:
    """A collator that pads on one side; ``positions``: with position ids that skip the padding."""

    def collate(rows: Sequence[Mapping[str, list[int]]]) -> Inputs:
        longest = max(len(row["input_ids"]) for row in rows)

        def pad(values: list[int], filler: int) -> list[int]:
            gap = [filler] * (longest - len(values))
            return gap + values if side == "left" else values + gap

        batch = {
            "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
            "attention_mask": torch.tensor([pad([1] * len(r["input_ids"]), 0) for r in rows]),
        }
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    return collate


def packed(rows: Sequence[Mapping[str, list[int]]]) -> Inputs:
    """One row of all examples, told apart by their position ids alone."""
    lengths = [len(row["input_ids"]) for row in rows]
    labels = [[-100, *row["labels"][1:]] for row in rows]
    return {
        "input_ids": torch.tensor([sum((row["input_ids"] for row in rows), [])]),
        "labels": torch.tensor([sum(labels, [])]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
    }


class RecordingTrainer(Trainer):
    """Keeps the loss of every micro-batch."""

    losses: list[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def arguments(path: Path, optimizer: OptimizerConfig, **changes: object) -> dict[str, object]:
    """Training arguments with the client's optimizer as ``optimizer`` says."""
    return {
        "output_dir": str(path / "trainer"),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "seed": 7,
        "optim": {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer.name],
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": optimizer.schedule,
        "max_grad_norm": 0.0,
        "use_cache": False,
        **changes,
    }


def train(
    model: PreTrainedModel, path: Path, optimizer: OptimizerConfig, collate: Any, **changes: object
) -> RecordingTrainer:
    """A trainer, not yet started, over 24 examples."""
    return RecordingTrainer(
        model=model,
        args=TrainingArguments(**arguments(path, optimizer, **changes)),
        train_dataset=examples(24),
        data_collator=collate,
    )


def whole_model(config: RunConfig) -> PreTrainedModel:
    """The unsplit model, its adapter away from zero."""
    whole = Whole(config)
    whole.load(perturbed(adapter_state(whole.model), seed=3))
    return whole.model


class Run:
    """What a run left behind."""

    def __init__(self, losses: list[float], *models: torch.nn.Module) -> None:
        self.losses = losses
        self.adapter: dict[str, Tensor] = {}
        for model in models:
            self.adapter.update(adapter_state(model))


def unsplit(
    config: RunConfig, path: Path, collate: Any, *, model: Any = None, **changes: object
) -> Run:
    model = model or whole_model(config)
    trainer = train(model, path, config.trunk.optimizer, collate, **changes)
    trainer.train()
    return Run(trainer.losses, model)


def in_process(config: RunConfig, path: Path, collate: Any, **changes: object) -> Run:
    client, trunk = split_model(whole_model(config), model_cuts(config))
    trainer = train(client, path, config.trunk.optimizer, collate, **changes)
    trainer.add_callback(LocalTrunkOptimizer(trunk, config.trunk.optimizer))
    trainer.train()
    return Run(trainer.losses, client, trunk)


def over_grpc(config: RunConfig, path: Path, collate: Any, **changes: object) -> Run:
    with served(config) as fed:
        client = remote_client(fed)
        trunk = client_trunk(fed, client)
        with trunk:
            trainer = train(client, path, config.trunk.optimizer, collate, **changes)
            connect_trainer(trainer, step_every=config.trunk.step_every)
            trainer.train()
        report = fed.coordinator.prepare_round("test", 1, 0)
        fed.coordinator.commit_round("test", 1, 0)
        run = Run(trainer.losses, client)
        run.adapter.update(fed.coordinator.get_adapter())
        run.report = report  # type: ignore[attr-defined]
        return run


@contextmanager
def served(config: RunConfig) -> Any:
    """A served trunk whose adapter is that of :func:`whole_model`, with round 1 open."""
    with federation(config) as fed:
        start = adapter_state(whole_model(config))
        own = adapter_state(fed.engine.compute.trunk)
        fed.load_trunk({name: start[name] for name in own})
        steps = STEPS if config.trunk.step_every == "local-step" else 1
        fed.begin([0], steps_per_round=steps)
        yield fed


def remote_client(fed: Federation) -> PreTrainedModel:
    """The client's model with the adapter of :func:`whole_model`."""
    from flower_split.lora import load_adapter_state

    client = fed.client_model(0)
    start = adapter_state(whole_model(fed.config))
    load_adapter_state(client, {name: start[name] for name in adapter_state(client)})
    return client


def client_trunk(fed: Federation, client: PreTrainedModel) -> Any:
    trunk = fed.remote(0)
    set_trunk(client, trunk)
    return trunk


def assert_equal_runs(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    """Losses step by step, and final weights, within a relative tolerance."""
    assert len(one.losses) == len(other.losses) > 0
    torch.testing.assert_close(
        torch.tensor(other.losses), torch.tensor(one.losses), rtol=tolerance, atol=tolerance
    )
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        difference = (other.adapter[name] - tensor).norm() / tensor.norm()
        assert difference <= 10 * tolerance, f"{name} differs by {difference:.2e}"


LORA = LoraPartConfig
SGD = OptimizerConfig(name="sgd", learning_rate=0.3, max_grad_norm=0.0)
ADAMW = OptimizerConfig(name="adamw", learning_rate=3e-3, max_grad_norm=0.0, schedule="linear")
