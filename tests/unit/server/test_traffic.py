"""Bytes by kind and client: counted where they pass, summed in the summary and the report."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flower_split.config import parse_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.runs.outcome import RoundOutcome
from flower_split.server.recorder import Recorder
from flower_split.server.traffic import MeteredGrid, Traffic, content_bytes, kind_of, trunk_calls
from tests.support.fakes import FakeGrid


def adapter(numbers: int) -> RecordDict:
    """Content whose array holds that many fp32 numbers."""
    return RecordDict({"arrays": ArrayRecord([np.zeros(numbers, np.float32)])})


@pytest.mark.parametrize(
    ("message_type", "kind"),
    [
        ("train", "adapters"),
        ("evaluate", "evaluation"),
        ("train.local_only", "baseline"),
        ("evaluate.local_only", "baseline"),
        ("query", ""),
    ],
)
def test_messages_have_their_kind_by_their_type(message_type: str, kind: str) -> None:
    assert kind_of(message_type) == kind


def test_a_grid_counts_messages_and_replies_for_the_clients_they_are_of() -> None:
    sent, back = adapter(10), adapter(100)
    grid = FakeGrid([7, 8], lambda message: back)
    traffic = Traffic()
    metered = MeteredGrid(grid, traffic, {0: 7, 1: 8})
    asks = [Message(sent, node, kind) for node, kind in ((7, "train"), (8, "query"))]
    ids = list(metered.push_messages(asks))
    left = set(ids)
    while left:
        left -= {r.metadata.reply_to_message_id for r in metered.pull_messages(left)}
    assert traffic.take() == {
        0: {"adapters_down": content_bytes(sent), "adapters_up": content_bytes(back)}
    }
    assert content_bytes(back) - content_bytes(sent) == 4 * 90  # fp32
    assert traffic.take() == {}


def test_content_counts_tensors_metrics_and_binary_values_beside_an_empty_text() -> None:
    config = ConfigRecord({"token": "", "y": b"12345"})
    assert content_bytes(RecordDict({"b": config})) == 5
    metrics = MetricRecord({"x": 1.0})
    both = RecordDict({"a": metrics, "b": config})
    assert content_bytes(both) == metrics.count_bytes() + 5


def test_trunk_calls_are_divided_into_activations_and_gradients() -> None:
    lists = {
        "bytes_sent": [100, 200],
        "bytes_received": [60, 70],
        "gradient_bytes_sent": [40, 50],
        "gradient_bytes_received": [10, 20],
    }
    assert trunk_calls(lists) == ((210, 100), (90, 30))
    assert trunk_calls({}) == ((0, 0), (0, 0))


def test_summary_and_report_have_the_bytes_by_client(tmp_path: Path) -> None:
    config = parse_run_config({"run-dir": str(tmp_path / "run"), "num-server-rounds": 1})
    recorder = Recorder(RunDirectory.create(config), config)
    held_out = {"loss-sum": 8.0, "num-tokens": 4, "bytes-sent": 11, "bytes-received": 13}
    for server_round in (0, 1):
        for partition_id in (0, 1):
            recorder.evaluation(server_round, partition_id, held_out)
            if server_round:
                lists = {"bytes_sent": [100.0 * (partition_id + 1)], "gradient_bytes_sent": [40.0]}
                recorder.steps(
                    server_round, partition_id, lists, {"num-tokens": 5, "train_loss": 1.0}
                )
        recorder.round_done(RoundOutcome(server_round, 1.0))
    recorder.traffic.add(1, "baseline", down=17)
    recorder.finish({})
    summary = recorder.run.summary()["bytes"]
    assert summary == {
        "0": {
            "activations_up": 60, "gradients_up": 40, "evaluation_up": 22, "evaluation_down": 26,
        },
        "1": {
            "activations_up": 160, "gradients_up": 40, "evaluation_up": 22, "evaluation_down": 26,
            "baseline_down": 17,
        },
        "all": {
            "activations_up": 220, "gradients_up": 80, "evaluation_up": 44, "evaluation_down": 52,
            "baseline_down": 17,
        },
    }  # fmt: skip
    report = (recorder.run.path / "report.md").read_text()
    assert "| bytes | 0 | 1 | all |" in report and "| activations_up | 60 | 160 | 220 |" in report


def test_a_perplexity_of_some_clients_says_of_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse_run_config({"run-dir": str(tmp_path / "run"), "fraction-evaluate": 0.5})
    recorder = Recorder(RunDirectory.create(config), config)
    recorder.names = {partition_id: "" for partition_id in range(4)}
    for partition_id in (3, 1):
        recorder.evaluation(1, partition_id, {"loss-sum": 0.0, "num-tokens": 4})
    with caplog.at_level("INFO", "flower_split"):
        recorder.round_done(RoundOutcome(1, 1.0))
    assert "held-out perplexity 1.00 (of partitions 1, 3 only)" in caplog.text
    (record,) = recorder.run.metrics("round")
    assert record["evaluated"] == [1, 3]
