"""A sweep's table: means, deviations and p-values, by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.experiments.grid import Cell, parse_grid
from flower_split.experiments.results import Demand, RunResult, by_run, by_variant, read_result
from flower_split.experiments.table import latex_table, table_cells, write_results
from flower_split.runs.files import write_json

AXES = parse_grid("mode=joint,frozen seed=0,1,2")


def result(mode: str, seed: int, perplexity: float, baseline: str = "") -> RunResult:
    values: tuple[tuple[str, str | int], ...] = (("mode", mode), ("seed", seed))
    return RunResult(
        cell=Cell(values[1:] if baseline else values, baseline),
        num_tokens=100,
        base=120.0,
        perplexity=perplexity,
        by_client={"0 a": perplexity},
        trained_tokens=10,
        trunk_bytes=2_500_000,
        adapter_bytes=0,
        seconds=10.0 + seed,
    )


def test_table_has_deviations_and_a_paired_test_over_seeds() -> None:
    # Losses differ by 0.1, 0.2 and 0.3: mean 0.2, deviation 0.1, t = 2 sqrt(3), and for two degrees
    # of freedom p = 1 - t / sqrt(t² + 2) = 1 - sqrt(12 / 14).
    ours = [10.0, 11.0, 15.0]
    frozen = [p * math.exp(0.1 * (seed + 1)) for seed, p in enumerate(ours)]
    results = [result("joint", seed, p) for seed, p in enumerate(ours)]
    results += [result("frozen", seed, p) for seed, p in enumerate(frozen)]
    first, second = by_variant(results, AXES)
    assert first.mean == 12.0
    assert first.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(first.p)
    assert second.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    changes = [100 * (math.exp(0.1 * k) - 1) for k in (1, 2, 3)]
    assert second.change == pytest.approx(sum(changes) / 3)
    header, *rows = table_cells([first, second])
    assert header[:5] == ["variant", "runs", "perplexity", "change", "p"]
    assert rows[0] == ["joint", "3", "12.00 ± 2.65", "–", "–", "2.5", "–", *["–"] * 4, "11"]
    assert rows[1][3:5] == ["+22.5 ± 12.2 %", "0.074"]


def test_table_pairs_only_the_seeds_that_both_have() -> None:
    results = [result("joint", 0, 10.0), result("joint", 1, 20.0), result("frozen", 1, 22.0)]
    _, second = by_variant(results, AXES)
    assert second.change == pytest.approx(10.0) and math.isnan(second.change_deviation)
    assert math.isnan(second.p) and math.isnan(second.deviation)


def test_table_of_equal_runs_says_so() -> None:
    results = [result(mode, seed, 10.0) for mode in ("joint", "frozen") for seed in (0, 1)]
    assert by_variant(results, AXES)[1].p == 1.0


def test_results_are_written_for_programs_and_papers(tmp_path: Path) -> None:
    results = [result("joint", 0, 10.0), result("joint", 0, 9.0, "central")]
    markdown = write_results(tmp_path, results, AXES)
    assert "| central | 1 | 9.00 | -10.0 % |" in markdown
    assert (tmp_path / "table.md").read_text() == markdown + "\n"
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("run,baseline,mode,seed,held_out_tokens")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert list(by_run(results)["perplexity"]) == [10.0, 9.0]


def test_memory_and_arithmetic_have_columns_where_they_are_known(tmp_path: Path) -> None:
    demand = Demand(client_bytes=3 << 20, client_flops=2_500_000_000, trunk_bytes=0, trunk_flops=0)
    results = [replace(result("joint", seed, 10.0), demand=demand) for seed in (0, 1)]
    header, row = table_cells(by_variant(results, AXES))
    cells = dict(zip(header, row, strict=True))
    assert (cells["client MiB"], cells["client GFLOP"], cells["trunk MiB"]) == ("3", "2.50", "–")
    assert list(by_run(results)["client_flops"]) == [2_500_000_000] * 2


def test_latex_escapes_what_latex_reads() -> None:
    text = latex_table([["a_b", "p"], ["5 %", "1.0 ± 0.5"], ["x & y", "< 0.001"]])
    assert r"a\_b & p \\" in text and r"5 \% & 1.0 $\pm$ 0.5 \\" in text
    assert r"x \& y & $<$ 0.001 \\" in text


def test_result_is_what_the_run_wrote(tmp_path: Path) -> None:
    overall = {"client": "all clients", "num_tokens": 7, "base": 9.0, "federated": 8.0}
    counted = {"activations_up": 1, "gradients_down": 2, "adapters_up": 4, "evaluation_up": 8}
    content = {
        "clients": [{**overall, "client": "0 a"}],
        "overall": overall,
        "facts": {"seconds": 1.5, "label tokens trained": 6},
        "bytes": {"0": counted, "all": counted},
        "notes": [],
    }
    write_json(tmp_path / "summary.json", content)
    found = read_result(Cell((("seed", 0),)), tmp_path)
    assert (found.trunk_bytes, found.adapter_bytes, found.trained_tokens) == (3, 4, 6)
    assert (found.base, found.perplexity, found.by_client) == (9.0, 8.0, {"0 a": 8.0})
