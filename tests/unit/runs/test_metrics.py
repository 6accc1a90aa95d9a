"""metrics.jsonl: one naming, and phase, round and UTC time on every line."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flower_split.errors import RunDirectoryError
from flower_split.runs.metrics import (
    COMMON,
    PHASES,
    SCHEMA,
    append_metric,
    read_metrics,
    write_metrics,
)


def test_every_line_has_the_common_fields(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for kind in SCHEMA:
        append_metric(path, kind, {"server_round": 2})
    for record in read_metrics(path):
        assert record.keys() == COMMON.keys()
        assert record["phase"] in PHASES and record["server_round"] == 2
        written = datetime.fromisoformat(str(record["time"]))
        assert written.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - written) < timedelta(minutes=5)


def test_names_are_written_and_read_in_snake_case(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metric(path, "evaluation", {"server_round": 0, "loss-sum": 2.0, "num-tokens": 4})
    assert set(json.loads(path.read_text())) >= {"loss_sum", "num_tokens"}
    path.write_text('{"kind": "evaluation", "server_round": 0, "loss-sum": 2.0}\n')  # of before
    assert read_metrics(path) == [{"kind": "evaluation", "server_round": 0, "loss_sum": 2.0}]


def test_a_line_may_name_its_phase(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metric(path, "evaluation", {"server_round": 3, "phase": "baseline"})
    assert [record["phase"] for record in read_metrics(path)] == ["baseline"]


def test_a_line_without_its_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="integer server_round.*'evaluation' has None"):
        append_metric(tmp_path / "metrics.jsonl", "evaluation", {"loss_sum": 1.0})


def test_records_written_anew_keep_their_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metric(path, "round", {"server_round": 1})
    before = read_metrics(path)
    write_metrics(path, before)
    assert read_metrics(path) == before


def test_the_schema_is_in_snake_case_and_names_known_phases() -> None:
    for kind in SCHEMA.values():
        assert kind.phase in PHASES
        assert all(name == name.lower().replace("-", "_") for name in kind.fields)
        assert not kind.fields.keys() & COMMON.keys()
