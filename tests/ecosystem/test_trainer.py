"""transformers' Trainer on the split client equals the same Trainer on the unsplit model."""

from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.rig import (
    SGD,
    STEPS,
    assert_equal_runs,
    checkpoint,
    in_process,
    over_grpc,
    packed,
    padded,
    run_config,
    unsplit,
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_trainer_split_equals_unsplit(tmp_path: Path, way: str, case: str) -> None:
    collate, changes = CASES[case]
    config = run_config(checkpoint(tmp_path / "model"), SGD)
    expected = unsplit(config, tmp_path, collate, **changes)
    assert_equal_runs(expected, WAYS[way](config, tmp_path, collate, **changes))
    assert expected.losses[-1] != expected.losses[0]
    assert len(expected.losses) == STEPS * int(changes.get("gradient_accumulation_steps", 1))
