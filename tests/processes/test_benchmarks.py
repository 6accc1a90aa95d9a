"""The benchmarks of several processes run, at their smallest, and print what they promise."""

import json
from pathlib import Path

import pytest

from flower_split.cli.main import main


@pytest.mark.slow
def test_bench_transport_has_grpc_beside_tcp_and_shared_memory_beside_memcpy(
    tmp_path: Path,
) -> None:
    order = ["bench", "transport", "--repeats", "2", "--sizes", "0.1", "--out", str(tmp_path)]
    assert main(order) == 0
    rows = {
        row["what"]: row for row in json.loads((tmp_path / "transport.json").read_text())["rows"]
    }
    assert {name: row["base"] for name, row in rows.items()} == {
        "0.1 MB: raw TCP": "0.1 MB: raw TCP",
        "0.1 MB: memcpy": "0.1 MB: raw TCP",
        "0.1 MB: gRPC, evaluation": "0.1 MB: raw TCP",
        "0.1 MB: gRPC, training call": "0.1 MB: raw TCP",
        "0.1 MB: shared memory, evaluation": "0.1 MB: memcpy",
        "0.1 MB: shared memory, training call": "0.1 MB: memcpy",
        **{
            f"0.1 MB: {what}": "0.1 MB: copy of a tensor"
            for what in (
                "copy of a tensor",
                "bfloat16, encode",
                "bfloat16, decode",
                "int8, encode",
                "int8, decode",
            )
        },
    }
    assert rows["0.1 MB: bfloat16, encode"]["of its bytes"] == 0.5
    assert 0.25 < rows["0.1 MB: int8, encode"]["of its bytes"] < 0.27
    assert all(len(row["seconds"]) == 2 and row["ratio"] > 0 for row in rows.values())


@pytest.mark.slow
def test_bench_transport_over_a_link_has_grpc_beside_tcp_and_the_share_of_the_link(
    tmp_path: Path,
) -> None:
    order = ["bench", "transport", "--repeats", "2", "--sizes", "0.5", "--out", str(tmp_path)]
    assert main([*order, "--link", "100", "--round-trip", "10"]) == 0
    rows = json.loads((tmp_path / "transport.json").read_text())["rows"]
    assert [(row["what"], row["base"]) for row in rows] == [
        ("0.5 MB: raw TCP", "0.5 MB: raw TCP"),
        ("0.5 MB: gRPC, evaluation", "0.5 MB: raw TCP"),
        ("0.5 MB: gRPC, training call", "0.5 MB: raw TCP"),
    ]
    # 0.04 s for each way at 12.5 MB/s, and 0.01 s there and back.
    assert all(row["of the link"] <= 0.08 / 0.09 + 0.01 for row in rows)
    assert all(row["median_seconds"] >= 0.089 for row in rows)


@pytest.mark.slow
def test_bench_step_has_the_split_step_beside_plain_peft(tmp_path: Path) -> None:
    order = ["bench", "step", "--clients", "1", "2", "--steps", "1", "--device", "cpu"]
    assert main([*order, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    reference = "unsplit PEFT, 8 sequences"
    assert [(row["what"], row["base"]) for row in rows] == [
        (reference, reference),
        ("split, exact, auto, 1 client x 8", reference),
        ("split, exact, auto, 2 clients x 4", reference),
    ]
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "what"),
    [("--replicas", "2 replicas"), ("--tensor-parallel", "layers over 2 processes")],
)
def test_bench_step_has_a_trunk_of_two_processes_beside_one(
    tmp_path: Path, option: str, what: str
) -> None:
    order = ["bench", "step", "--clients", "2", option, "2", "--steps", "1"]
    assert main([*order, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    reference, one = "unsplit PEFT, 8 sequences", "split, exact, auto, 2 clients x 4"
    assert [(row["what"], row["base"]) for row in rows] == [
        (reference, reference),
        (one, reference),
        (f"{one}, {what}", one),
    ]


@pytest.mark.slow
def test_bench_experiments_takes_no_more_memory_than_base_and_states(tmp_path: Path) -> None:
    order = ["bench", "experiments", "--repeats", "1", "--micro-batches", "1", "--device", "cpu"]
    assert main([*order, "--out", str(tmp_path)]) == 0
    one, eight = json.loads((tmp_path / "experiments.json").read_text())["rows"]
    assert (one["what"], eight["what"]) == ("one experiment", "8 experiments")
    assert eight["base"] == one["base"] == "one experiment" and eight["tokens/s"] > 0
    assert eight["trunk MiB"] <= 1.1 * eight["base + states MiB"]


@pytest.mark.slow
def test_bench_clients_has_the_trunks_rate_and_memory_beside_its_arithmetic(tmp_path: Path) -> None:
    order = ["bench", "clients", "--clients", "1", "3", "--steps", "1", "--repeats", "2"]
    assert main([*order, "--device", "cpu", "--out", str(tmp_path)]) == 0
    alone, one, three = json.loads((tmp_path / "clients.json").read_text())["rows"]
    assert alone["what"] == one["base"] == three["base"] == "the arithmetic alone"
    assert (one["what"], three["what"]) == ("1 clients", "3 clients")
    for row in (one, three):
        assert 0 < row["activations MiB"] <= row["budget MiB"] == 1024
        assert row["recomputed"] == 0 and row["tokens/s"] > 0 and len(row["seconds"]) == 2
    # Forwards of all may be kept at once, and no more than those.
    assert three["activations MiB"] <= 3.1 * one["activations MiB"]
    assert max(one["of the best"], three["of the best"]) == 1


@pytest.mark.slow
def test_bench_quickstart_has_a_runs_phases_beside_plain_peft(tmp_path: Path) -> None:
    app = Path(__file__).parents[2] / "simulations" / "quickstart"
    changes = (
        "num-server-rounds=1 num-clients=2 train.local-steps=1 data.max-eval-batches=1 "
        "local-only-baseline=false report=''"
    )
    order = ["bench", "quickstart", str(app), "--local", "--run-config", changes]
    assert main([*order, "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = {
        row["what"]: row for row in json.loads((tmp_path / "quickstart.json").read_text())["rows"]
    }
    plain, ours = "plain PEFT, 1 thread", "flower-split run --local"
    for phase in ("start", "training", "evaluation"):
        assert rows[f"{ours}: {phase}"]["base"] == f"{plain}: {phase}"
        assert rows[f"{plain}: {phase}"]["median_seconds"] > 0
    parts = [row["median_seconds"] for what, row in rows.items() if what.startswith(f"{ours}: ")]
    assert sum(parts) == pytest.approx(rows[ours]["median_seconds"], abs=0.5)
    # After one step from the same weights on the same tokens both are about as good.
    assert rows[ours]["perplexity"] == pytest.approx(rows[plain]["perplexity"], rel=0.1)
