"""Costs out of a run's record, and the command that uses them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.cli.main import main
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.scale.calibration import calibrate
from tests.acceptance.federation import make_config, write_checkpoint
from tests.support.tiny_app import make_app

ROUNDS, STEPS = 2, 3


def record(folder: Path, clients: int = 1, **train: int) -> RunDirectory:
    """A run of two rounds: a micro-batch computes 0.2 s on a client and 0.05 s on the trunk."""
    config = make_config(folder / "nothing", local_steps=STEPS, **train)
    config = replace(
        config, num_clients=clients, num_server_rounds=ROUNDS, run_dir=str(folder / "run")
    )
    run = RunDirectory.create(config)
    count = config.train.gradient_accumulation_steps
    for partition_id in range(clients):
        of_data = {"num_examples": 50, "num_eval_examples": 20, "planned_steps": STEPS}
        run.append("data", {"server_round": 0, "partition_id": partition_id, "name": "", **of_data})
    for server_round in range(1, ROUNDS + 1):
        place = {"server_round": server_round}
        for partition_id in range(clients):
            for step in range(STEPS):
                cold = 5.0 if step == 0 else 0.0  # the first step of a round warms up
                seconds = {
                    "compute_seconds": 0.2 * count + cold,
                    "wait_seconds": 0.01,
                    "trunk_seconds": 0.05 * count,
                    "wire_seconds": 0.012 * count,
                }
                moved = {"bytes_sent": 1000 * count, "bytes_received": 800 * count}
                who = {"partition_id": partition_id, "step": step}
                run.append("step", {**place, **who, **seconds, **moved})
            run.append("bytes", {**place, "partition_id": partition_id, "adapters_up": 640})
        made = STEPS * count * clients
        run.append("trunk", {**place, "compute_seconds": 0.05 * made})
        members = [str(n) for n in range(clients)]
        run.append("aggregation", {**place, "clients": members, "seconds": 0.3 * clients})
        training = STEPS * (0.262 * count + 0.01) + 5.0
        run.append("round", {**place, "seconds": training + 0.3 * clients + 1.5})
    return run


@pytest.mark.parametrize("count", [1, 2])
def test_costs_are_the_record_divided_by_hand(tmp_path: Path, count: int) -> None:
    run = record(tmp_path, gradient_accumulation_steps=count, micro_batches_in_flight=1)
    found = calibrate(run, ends_together=False)
    costs = found.costs
    assert costs.client_seconds == pytest.approx(0.2)
    assert costs.trunk_seconds == pytest.approx(0.05)
    assert costs.call_seconds == costs.handling_seconds == pytest.approx(0.012 / 2 / 2)
    assert (costs.sent_bytes, costs.received_bytes, costs.adapter_bytes) == (1000, 800, 640)
    assert costs.step_seconds == pytest.approx(0.01)  # one client waits for nobody else
    assert costs.server_client_seconds == pytest.approx(0.3)
    assert costs.round_seconds == pytest.approx(1.5, abs=0.2)
    assert found.steps == STEPS and found.eval_batches == 3 and found.notes == []


def test_what_a_run_cannot_tell_is_said(tmp_path: Path) -> None:
    several = calibrate(record(tmp_path, clients=3), ends_together=False)
    assert several.costs.step_seconds == 0.0
    assert "waited for each other" in several.notes[0]


def test_overlapping_micro_batches_are_refused(tmp_path: Path) -> None:
    run = record(tmp_path, gradient_accumulation_steps=2, micro_batches_in_flight=2)
    with pytest.raises(ConfigError, match="in flight"):
        calibrate(run, ends_together=False)


def test_command_predicts_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(record(tmp_path).path)
    options = ["--link", "inf:0", "--clients", "1,8,1e6", "--cohort", "8", "--json"]
    assert main(["simulate", run, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["clients"], row["cohort"]) for row in found["rows"]] == [
        (1, 1),
        (8, 8),
        (10**6, 8),
    ]
    one, eight, many = (row["prediction"] for row in found["rows"])
    # The trunk's step runs beside the client, whose next forward finds the new version.
    assert one["round_seconds"] == pytest.approx(STEPS * (0.2 + 0.05 + 0.012) + 0.3 + 1.5, rel=0.05)
    assert eight["round_seconds"] == pytest.approx(many["round_seconds"], rel=0.01)
    assert eight["holds_up"] == "server"  # 8 x 0.3 + 1.5 s, by the record
    assert many["evaluation_seconds"] > 1000 * eight["evaluation_seconds"]
    assert main(["simulate", run, "--clients", "1000"]) == 0
    said = capsys.readouterr().out
    assert "cannot run" in said and "stand still" in said


def test_command_predicts_from_an_app(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flower_split.config import resolved_run_config

    config: RunConfig = make_config(write_checkpoint(tmp_path / "model"), batch_size=2)
    app = str(make_app(tmp_path / "app", resolved_run_config(config)))
    rates = ["--client-gflops", "1", "--trunk-gflops", "10"]
    assert main(["simulate", app, *rates, "--clients", "4", "--cost", "round-seconds=2"]) == 0
    said = capsys.readouterr().out
    assert "flower-split plan" in said and "round-seconds 2" in said and "| 4 | 4 |" in said
    assert main(["simulate", app, *rates, "--cost", "rounds=2"]) == 2
