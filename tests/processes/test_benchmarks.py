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
def test_bench_experiments_takes_no_more_memory_than_base_and_states(tmp_path: Path) -> None:
    order = ["bench", "experiments", "--repeats", "1", "--micro-batches", "1", "--device", "cpu"]
    assert main([*order, "--out", str(tmp_path)]) == 0
    one, eight = json.loads((tmp_path / "experiments.json").read_text())["rows"]
    assert (one["what"], eight["what"]) == ("one experiment", "8 experiments")
    assert eight["base"] == one["base"] == "one experiment" and eight["tokens/s"] > 0
    assert eight["trunk MiB"] <= 1.1 * eight["base + states MiB"]
