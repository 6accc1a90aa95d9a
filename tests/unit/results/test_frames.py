"""A run's metrics as DataFrames."""

import json
from pathlib import Path

import pytest

from flower_split import results
from flower_split.config import parse_run_config, resolved_run_config
from flower_split.errors import RunDirectoryError
from flower_split.runs.metrics import FILE, SCHEMA, append_metric


def test_load_gives_a_frame_for_every_kind(tmp_path: Path) -> None:
    values = resolved_run_config(parse_run_config({}))
    (tmp_path / "config.json").write_text(json.dumps(values))
    for step, loss in enumerate((4.0, 2.0)):
        append_metric(
            tmp_path / FILE,
            "step",
            {"server_round": 1, "partition_id": 0, "step": step, "loss": loss, "extra": 1},
        )
    append_metric(tmp_path / FILE, "round", {"server_round": 1, "train_loss": 3.0})
    frames = results.load(tmp_path)
    assert frames.keys() == SCHEMA.keys()
    assert frames["step"].groupby("server_round")["loss"].mean().to_dict() == {1: 3.0}
    assert list(frames["step"].columns) == [
        "kind", "phase", "server_round", "time", "partition_id", "step", "loss", "extra",
    ]  # fmt: skip
    assert str(frames["round"]["time"].dt.tz) == "UTC"
    assert frames["trunk"].empty and "optimizer_steps" in frames["trunk"]


def test_load_of_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="config.json is missing"):
        results.load(tmp_path)
