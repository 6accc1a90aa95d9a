"""The comparison of all methods runs and learns."""

import csv
import math
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_comparison_prints_a_table_and_every_method_learns(request, tmp_path):
    script = request.config.rootpath / "simulations" / "aggregators" / "compare.py"
    methods = ["fedit", "flora", "fedsa-lora", "product-delta"]
    budget = ["--rounds", "2", "--local-steps", "3", "--clients", "4", "--eval-examples", "4"]
    done = subprocess.run(
        [sys.executable, script, "--methods", *methods, *budget, "--out", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == methods
    assert (tmp_path / "table.md").read_text(encoding="utf-8").strip() in done.stdout
    losses = {}
    with (tmp_path / "losses.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            losses.setdefault((line["method"], line["setting"]), []).append(float(line["loss"]))
    assert len(losses) == 4 + 2 + 4  # two methods serve mixed ranks
    for key, values in losses.items():
        assert len(values) == 3
        assert math.isfinite(values[-1]) and values[-1] < values[0] - 0.05, key
