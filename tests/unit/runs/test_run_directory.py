"""The run directory: what is written is read back, damage is named, a crash leaves no half file."""

import json
import math
from pathlib import Path

import pytest
import torch

from flower_split.config import RunConfig, TrainConfig
from flower_split.errors import RunDirectoryError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.summary import ClientOutcome, HeldOut, summarize
from flower_split.runtime import atomic_files


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = RunConfig(seed=7, run_dir=str(tmp_path / "run"), train=TrainConfig(local_steps=3))
    return RunDirectory.create(config)


def test_run_directory_created_and_opened_has_the_same_config(run: RunDirectory) -> None:
    assert RunDirectory.open(run.path).config == run.config
    flat = json.loads((run.path / "config.json").read_text())
    assert (flat["seed"], flat["train.local-steps"]) == (7, 3)
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert {"python", "flower_split", "transformers", "peft", "flwr", "grpcio"} <= set(versions)


def test_run_directory_without_a_name_goes_under_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = RunDirectory.create(RunConfig()), RunDirectory.create(RunConfig())
    assert first.path.parent == second.path.parent == tmp_path / "runs"
    assert first.path != second.path


def test_create_in_a_directory_with_files_is_refused(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="empty directory.*run-dir"):
        RunDirectory.create(run.config)


def test_create_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be made"):
        RunDirectory.create(RunConfig(run_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.json is missing.*is no run directory"),
        ("{", "config.json is damaged"),
        ("[1]", "must hold a JSON object; it holds a list"),
        ('{"seeed": 1}', "unknown run-config key 'seeed'"),
    ],
)
def test_open_of_a_damaged_directory_names_file_and_fault(
    run: RunDirectory, content: str | None, expected: str
) -> None:
    path = run.path / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunDirectoryError, match=expected):
        RunDirectory.open(run.path)


def test_open_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run directory"):
        RunDirectory.open(tmp_path / "absent")


def test_metrics_appended_come_back_in_order_by_kind(run: RunDirectory) -> None:
    run.append("step", {"server_round": 1, "step": 0, "loss": 2.5})
    run.append("round", {"server_round": 1, "clients": [0, 1]})
    run.append("step", {"server_round": 1, "step": 1, "loss": math.nan})
    assert [record["loss"] for record in run.metrics("step")] == [2.5, None]
    (record,) = run.metrics("round")
    assert record.items() >= {"kind": "round", "server_round": 1, "phase": "round"}.items()
    assert record["clients"] == [0, 1]
    assert len(run.metrics()) == 3
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["step", "round", "step"]


def test_metrics_of_an_unknown_kind_are_refused(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="one of step, evaluation, round, trunk"):
        run.append("steps", {})


def test_metrics_with_a_torn_last_line_lose_only_that_line(run: RunDirectory) -> None:
    run.append("step", {"server_round": 1, "step": 0})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, "ki')
    assert [record["step"] for record in run.metrics()] == [0]
    run.append("step", {"server_round": 1, "step": 1})
    assert [record["step"] for record in run.metrics()] == [0, 1]


def test_metrics_with_a_bad_line_name_it(run: RunDirectory) -> None:
    run.append("step", {"server_round": 1, "step": 0})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(RunDirectoryError, match="metrics.jsonl, line 2"):
        run.metrics()


def test_adapters_come_back_exactly_and_sorted(run: RunDirectory) -> None:
    state = {"b.lora_B.weight": torch.randn(3, 2), "a.lora_A.weight": torch.randn(2, 4).t()}
    run.write_adapter("client", state)
    back = RunDirectory.open(run.path).read_adapter("client")
    assert list(back) == ["a.lora_A.weight", "b.lora_B.weight"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_adapters_missing_or_damaged_are_named(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="trunk.safetensors is missing"):
        run.read_adapter("trunk")
    run.write_adapter("trunk", {"a": torch.ones(8)})
    path = run.path / "adapters" / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunDirectoryError, match="trunk.safetensors is damaged"):
        run.read_adapter("trunk")
    with pytest.raises(RunDirectoryError, match="one of client, base, trunk"):
        run.read_adapter("top")


def test_atomic_write_that_dies_before_the_rename_keeps_the_old_file(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_adapter("client", {"a": torch.zeros(2)})
    fired = []

    def dies(*_: object) -> None:
        fired.append(True)
        raise OSError("out of space")

    monkeypatch.setattr(atomic_files.os, "replace", dies)
    with pytest.raises(OSError, match="out of space"):
        run.write_adapter("client", {"a": torch.ones(2)})
    assert fired
    assert torch.equal(run.read_adapter("client")["a"], torch.zeros(2))
    assert [path.name for path in (run.path / "adapters").iterdir()] == ["client.safetensors"]


def test_outcome_written_is_read_back_and_rendered(run: RunDirectory) -> None:
    run.append("round", {"server_round": 1, "train_loss": 1.25, "other": "x"})
    outcome = ClientOutcome(
        partition_id=0,
        before=HeldOut(10 * math.log(8), 10),
        after=HeldOut(10 * math.log(4), 10),
        name="a|b",
    )
    run.write_outcome(
        summarize([outcome]),
        facts={"seconds": 12.5, "bytes sent": 1234567, "rate": math.inf},
        notes=["The bottom did not train."],
    )
    summary = RunDirectory.open(run.path).summary()
    assert summary["clients"][0]["base"] == pytest.approx(8)
    assert summary["clients"][0]["local_own"] is None
    assert summary["overall"]["federated"] == pytest.approx(4)
    assert summary["facts"] == {"seconds": 12.5, "bytes sent": 1234567, "rate": None}
    text = (run.path / "report.md").read_text()
    assert "| 0 a\\|b | 10 | 8.00 | 4.00 | -50.0 % |" in text
    assert "| bytes sent | 1,234,567 |" in text
    assert "| server_round | train_loss |" in text and "| 1 | 1.25 |" in text
    assert "> The bottom did not train." in text
    assert "| `train.local-steps` | `3` |" in text


def test_summary_of_an_unfinished_run_is_refused(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="summary.json is missing"):
        run.summary()
