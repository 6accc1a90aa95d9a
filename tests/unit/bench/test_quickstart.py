"""A run's phases are read from its records; what plain PEFT has no equal of is refused."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from flower_split.bench.quickstart import QuickstartBench, measure_quickstart, phases
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError

BEGAN = 1767225600.0  # 2026-01-01T00:00:00 UTC


def record(second: int, kind: str, phase: str) -> dict[str, object]:
    return {"time": f"2026-01-01T00:00:{second:02}.000+00:00", "kind": kind, "phase": phase}


def test_every_second_of_a_run_belongs_to_one_phase() -> None:
    records = [
        record(7, "data", "train"),  # what the clients say of themselves: 7 s of start
        record(9, "evaluation", "evaluate"),  # 2 s
        record(9, "round", "round"),
        record(14, "step", "train"),  # 5 s of training
        record(15, "trunk", "train"),  # 1 s
        record(16, "aggregation", "aggregate"),  # 1 s
        record(19, "evaluation", "evaluate"),  # 3 s
        record(20, "round", "round"),  # closes the round: 1 s of the evaluation
        record(30, "evaluation", "baseline"),  # 10 s
    ]
    assert phases(records, BEGAN, BEGAN + 33) == {
        "start": 7.0,
        "training": 7.0,
        "evaluation": 6.0,
        "baseline": 10.0,
        "end": 3.0,
    }


def test_a_run_without_records_is_all_end() -> None:
    assert phases([], BEGAN, BEGAN + 4) == {
        "start": 0.0,
        "training": 0.0,
        "evaluation": 0.0,
        "baseline": 0.0,
        "end": 4.0,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.local-steps": 0, "train.local-epochs": 1}, "by steps"),
        ({"fraction-train": 0.5}, "all clients in every round"),
        (
            {"model.task": "sequence-classification", "model.labels": "a, b"},
            "causal language modelling",
        ),
    ],
)
def test_a_run_that_plain_peft_has_no_equal_of_is_refused(
    changes: Mapping[str, Scalar], words: str
) -> None:
    bench = QuickstartBench(app=Path("nowhere"), config=parse_run_config(changes))
    with pytest.raises(ConfigError, match=words):
        measure_quickstart(bench)
