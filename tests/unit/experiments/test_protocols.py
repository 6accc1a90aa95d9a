"""Budgets, targets and harder conditions, on curves drawn by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from flower_split.errors import ConfigError
from flower_split.experiments.grid import Cell, parse_grid
from flower_split.experiments.protocols import (
    Compared,
    Limits,
    Point,
    cost_to,
    loss_under,
    protocol_tables,
    quality_within,
    read_curve,
    write_protocols,
)
from flower_split.experiments.results import Demand, RunResult
from flower_split.runs.metrics import append_metric

AXES = parse_grid("mode=joint,frozen fraction-train=1.0,0.5,0.25 seed=0,1")


def curve(*perplexities: float, megabytes: float = 1.0) -> list[Point]:
    """A point for each round: a round takes so many bytes, ten seconds and five tokens."""
    return [
        Point(
            server_round=n,
            perplexity=p,
            num_bytes=n * megabytes * 1e6,
            seconds=10.0 * n,
            tokens=5.0 * n,
        )
        for n, p in enumerate(perplexities)
    ]


def result(perplexity: float, mode: str = "joint", share: float = 1.0, seed: int = 0) -> RunResult:
    return RunResult(
        cell=Cell((("mode", mode), ("fraction-train", share), ("seed", seed))),
        num_tokens=10,
        base=100.0,
        perplexity=perplexity,
        by_client={},
        trained_tokens=10,
        trunk_bytes=1,
        adapter_bytes=0,
        seconds=1.0,
    )


def test_a_budget_buys_the_last_round_that_it_pays_for_and_not_the_best() -> None:
    points = curve(90.0, 60.0, 50.0, 55.0, 40.0)
    for budget, perplexity in ((0.5e6, 90.0), (1e6, 60.0), (3.9e6, 55.0), (9e9, 40.0)):
        found = quality_within(points, num_bytes=budget)
        assert found is not None and found.perplexity == perplexity
    both = quality_within(points, num_bytes=3e6, seconds=10.0)
    assert both is not None and both.server_round == 1  # both must be paid for
    assert quality_within(points[1:], num_bytes=1.0) is None


def test_a_target_costs_what_was_spent_when_it_was_first_reached() -> None:
    points = curve(90.0, 60.0, 50.0, 55.0, 40.0)
    found = cost_to(points, 55.0)
    assert found == points[2] and (found.num_bytes, found.seconds, found.tokens) == (
        2e6,
        20.0,
        10.0,
    )
    assert cost_to(points, 39.9) is None and cost_to(points, 90.0) == points[0]


def test_harder_conditions_are_compared_seed_by_seed_with_the_easy_one() -> None:
    results = [
        result(10.0, seed=0), result(20.0, seed=1),
        result(11.0, share=0.5, seed=0), result(26.0, share=0.5, seed=1),
        result(15.0, share=0.25, seed=0),
        result(10.0, "frozen"), result(9.0, "frozen", 0.5),
    ]  # fmt: skip
    found = loss_under(results, AXES, "fraction-train")
    assert found["joint"] == {0.5: pytest.approx([10.0, 30.0]), 0.25: pytest.approx([50.0])}
    assert found["frozen"] == {0.5: pytest.approx([-10.0]), 0.25: []}


def test_tables_have_means_and_deviations_over_seeds() -> None:
    runs = [
        Compared(result=result(40.0, seed=0), curve=curve(90.0, 60.0, 40.0)),
        Compared(result=result(44.0, seed=1), curve=curve(90.0, 64.0, 44.0)),
        Compared(result=result(70.0, "frozen"), curve=curve(90.0, 80.0, 70.0, megabytes=0.0)),
    ]
    limits = Limits(megabytes=1.5, perplexity=62.0, harder="fraction-train")
    tables = protocol_tables(runs, AXES, limits)
    within, cost, harder = tables.values()
    assert list(tables)[:2] == ["Quality within 1.5 MB", "Cost to perplexity 62"]
    joint, frozen = "joint, fraction-train 1.0", "frozen, fraction-train 1.0"
    assert within[1] == [joint, "2 of 2", "62.00 ± 2.83", "1.0 ± 0.0"]  # sqrt(8)
    assert within[2] == [frozen, "1 of 1", "70.00", "2.0"]
    # Rounds 1 and 2: deviation sqrt(0.5).
    assert cost[1] == [joint, "2 of 2", "1.5 ± 0.7", "1.5 ± 0.7", "15 ± 7", "8 ± 4"]
    assert cost[2] == [frozen, "0 of 1", "–", "–", "–", "–"]
    assert harder[1] == ["joint", "–", "–", "–"]
    assert protocol_tables(runs, AXES, Limits()) == {}


def test_a_curve_counts_training_and_no_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def line(kind: str, server_round: int, **values: float | None) -> None:
        append_metric(path, kind, {"server_round": server_round, **values})

    line("round", 0, seconds=3.0, perplexity=90.0)
    line("bytes", 0, partition_id=0, evaluation_up=7, evaluation_down=7)
    for client in (0, 1):
        line(
            "bytes", 1, partition_id=client, activations_up=1, gradients_down=2, adapters_up=4,
            evaluation_up=100, baseline_up=1000,
        )  # fmt: skip
    line("round", 1, seconds=10.0, num_tokens=50)  # was not evaluated
    line("bytes", 2, partition_id=0, activations_down=8)
    line("round", 2, seconds=5.0, num_tokens=50, perplexity=None)  # no finite number
    line("round", 3, seconds=5.0, num_tokens=10, perplexity=60.0)
    found = [(p.server_round, p.num_bytes, p.seconds, p.tokens) for p in read_curve(tmp_path)]
    assert found == [(0, 0.0, 3.0, 0.0), (2, 22.0, 18.0, 100.0), (3, 22.0, 23.0, 110.0)]
    assert [p.perplexity for p in read_curve(tmp_path)] == [90.0, math.inf, 60.0]
    # What a baseline in one process does not count comes from the plan, in equal rounds.
    assert [p.num_bytes for p in read_curve(tmp_path, 300.0)] == [0.0, 222.0, 322.0]
    text = write_protocols(
        tmp_path,
        [result(60.0)],
        {result(60.0).cell: tmp_path},
        AXES,
        Limits(perplexity=61.0),
    )
    assert "| 1 of 1 | 3.0 | 0.0 | 23 | 110 |" in text
    assert (tmp_path / "protocols.md").read_text() == text + "\n"
    demand = Demand(
        client_bytes=1, client_flops=1, trunk_bytes=1, trunk_flops=1, wire_bytes=3_000_000
    )
    planned = replace(result(60.0), trunk_bytes=0, demand=demand)
    text = write_protocols(
        tmp_path, [planned], {planned.cell: tmp_path}, AXES, Limits(perplexity=61.0)
    )
    assert "| 1 of 1 | 3.0 | 3.0 |" in text
    assert json.loads(path.read_text().splitlines()[0])["kind"] == "round"  # nothing was changed


@pytest.mark.parametrize("key", ["seed", "strategy.aggregator"])
def test_harder_conditions_must_be_values_of_the_grid(key: str) -> None:
    with pytest.raises(ConfigError, match="--robust-over must name a key of the grid"):
        Limits(harder=key).check(AXES)
    with pytest.raises(ConfigError, match="at least 0; seconds is -1"):
        Limits(seconds=-1.0)
    Limits(harder="fraction-train").check(AXES)
