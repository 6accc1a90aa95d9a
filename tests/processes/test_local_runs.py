"""Local runs: real node processes and a real trunk process, without SuperLink and Ray."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flower_split.config import Scalar
from flower_split.runs.directory import RunDirectory
from tests.processes.test_runs import adapters_of, central_step, digest
from tests.support.flower_home import BIN, Flower, processes_of
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("local")
    return make_model(root / "model"), make_data(root / "data", 3)


def app_of(root: Path, parts: tuple[Path, str], **changes: Scalar) -> Path:
    config = tiny_config(*parts, num_clients=3, **changes)
    return make_app(root / "app", {**config, "run-dir": str(root / "run")})


def test_local_run_equals_the_unsplit_model_on_the_union(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    import torch

    done = flower.command("flower-split", "run", str(app_of(tmp_path, parts)), "--local")
    assert done.returncode == 0, done.stdout
    assert "round 1/1 done" in done.stdout and "all clients" in done.stdout
    run = RunDirectory.open(tmp_path / "run")
    found, expected = adapters_of(run), central_step(run.config, 3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow  # two runs under Flower's own SuperLink are minutes on a busy machine
def test_local_run_ends_on_the_bits_of_flwr_run(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    """With dropout, so that random states take part."""
    app = app_of(
        tmp_path, parts, num_server_rounds=2, train__local_steps=2, lora__trunk__dropout=0.1,
        lora__top__dropout=0.1,
    )  # fmt: skip
    for name, options in (("local", ["--local"]), ("flower", [])):
        config = f'run-dir="{tmp_path / name}"'
        done = flower.command("flower-split", "run", str(app), "-c", config, *options, timeout=550)
        assert done.returncode == 0, done.stdout
    local, flowers = (RunDirectory.open(tmp_path / name) for name in ("local", "flower"))
    assert digest(adapters_of(local)) == digest(adapters_of(flowers))
    for kind, field in (("step", "loss"), ("evaluation", "loss_sum"), ("bytes", "adapters_up")):
        expected = [record.get(field) for record in flowers.metrics(kind)]
        assert [record.get(field) for record in local.metrics(kind)] == expected


def test_local_run_of_a_job_that_cannot_run_says_why_and_leaves_no_process(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    app = app_of(tmp_path, parts)
    before = processes_of(flower.home)
    done = flower.command(
        "flower-split", "run", str(app), "--local", "-c", "train.sequence-length=9999"
    )
    assert done.returncode == 2
    assert "train.sequence-length" in done.stdout and "Traceback" not in done.stdout
    assert set(processes_of(flower.home)) <= set(before)


@pytest.mark.slow
def test_local_run_that_fails_exits_with_1_and_names_file_and_line(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    data = make_data(tmp_path / "broken", 3)
    Path(data.replace("{partition_id}", "1")).write_text("{no json\n")
    app = app_of(tmp_path, (parts[0], data))
    done = flower.command("flower-split", "run", str(app), "--local")
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("flower-split: ") and "line 1" in last and "1.jsonl" in last


@pytest.mark.slow
def test_local_run_stops_on_sigterm_and_leaves_no_process(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    app = app_of(tmp_path, parts, num_server_rounds=10_000, fraction_evaluate=0.0)
    before = processes_of(flower.home)
    process = subprocess.Popen(
        [str(BIN / "flower-split"), "run", str(app), "--local"],
        env=dict(flower.env), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (
        metrics.is_file() and '"step"' in metrics.read_text()
    ):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 4, text
    assert "--local --resume" in text
    assert set(processes_of(flower.home)) <= set(before)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert any(line["kind"] == "step" for line in lines)


def test_local_run_takes_no_superlink(
    flower: Flower, tmp_path: Path, parts: tuple[Path, str]
) -> None:
    app = app_of(tmp_path, parts)
    done = flower.command("flower-split", "run", str(app), "somewhere", "--local")
    assert done.returncode == 2 and "--local" in done.stdout
