"""Loggers tell TensorBoard, Weights & Biases and MLflow what is in ``metrics.jsonl``: read back here."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flower_split.config import RunConfig, TrainConfig, parse_run_config
from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import Json
from flower_split.runs.loggers.logger import LoggedRun, MetricLogger, PackageLogger, Record
from flower_split.runs.loggers.points import Curves, Point
from flower_split.runs.loggers.registry import LOGGERS, make_loggers
from flower_split.runs.loggers.run_loggers import logged
from tests.support.distributions import installed

ROUND_1: list[tuple[str, dict[str, Json]]] = [
    ("step", {"partition_id": 0, "step": 0, "loss": 3.0, "num_tokens": 7}),
    ("step", {"partition_id": 0, "step": 1, "loss": 2.5, "num_tokens": 7}),
    ("step", {"partition_id": 1, "step": 0, "loss": 4.0, "grad_norm": float("inf")}),
    ("central", {"metrics": {"accuracy": 0.25}, "seconds": 1.5}),
    ("round", {"seconds": 2.0, "eval_loss": 2.0, "evaluated": [0, 1]}),
]
ROUND_2: list[tuple[str, dict[str, Json]]] = [
    ("step", {"partition_id": 0, "step": 0, "loss": 2.0, "num_tokens": 7}),
    ("evaluation", {"partition_id": 1, "loss_sum": 8.0, "perplexity": 7.5}),
    ("evaluation", {"partition_id": 1, "loss_sum": 9.0, "local_only": True, "trained_by": 0}),
    ("round", {"seconds": 2.5, "eval_loss": 1.5, "evaluated": [0, 1]}),
]
CURVES = {  # by hand, from the lines above: curve -> (at, value)
    "step/loss/client-0": [(1, 3.0), (2, 2.5), (3, 2.0)],
    "step/num_tokens/client-0": [(1, 7.0), (2, 7.0), (3, 7.0)],
    "step/loss/client-1": [(1, 4.0)],
    "central/accuracy": [(1, 0.25)],
    "central/seconds": [(1, 1.5)],
    "round/seconds": [(1, 2.0), (2, 2.5)],
    "round/eval_loss": [(1, 2.0), (2, 1.5)],
    "evaluation/loss_sum/client-1": [(2, 8.0)],
    "evaluation/perplexity/client-1": [(2, 7.5)],
}


def append(run: RunDirectory, server_round: int, lines: list[tuple[str, dict[str, Json]]]) -> None:
    for kind, record in lines:
        run.append(kind, {"server_round": server_round, **record})


def train(path: Path, name: str) -> RunDirectory:
    """A run that is lost after round 1, and resumed by another process for round 2."""
    config = RunConfig(run_dir=str(path), seed=3, train=TrainConfig(report_to=name))
    run = RunDirectory.create(config)
    with pytest.raises(ZeroDivisionError):
        with logged(run, make_loggers(config)):
            append(run, 1, ROUND_1)
            raise ZeroDivisionError
    resumed = RunDirectory.open(path)
    with logged(resumed, make_loggers(config)):
        append(resumed, 2, ROUND_2)
    return resumed


def test_lines_become_points() -> None:
    curves, found = Curves(), {}
    for server_round, lines in ((1, ROUND_1), (2, ROUND_2)):
        for kind, record in lines:
            line: Record = {"kind": kind, "server_round": server_round, **record}
            for point in curves.points(line):
                found.setdefault(point.curve, []).append((point.at, point.value))
    assert found == CURVES
    baseline = {"kind": "bytes", "phase": "baseline", "server_round": 2, "partition_id": 0}
    assert Curves().points({**baseline, "baseline_up": 3}) == []
    assert Curves().points({"kind": "round", "server_round": 0, "seconds": 0.5}) == [
        Point("round/seconds", 0.5, 0)
    ]


def test_tensorboard_has_every_point_once_also_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    } == CURVES
    [settings] = events.Tensors("settings/text_summary")
    assert b"| seed | 3 |" in settings.tensor_proto.string_val[0]


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB's form, whose first seven bytes are its header."""
    block, at, record = 1 << 15, 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:  # no room for a record's head
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", log[at : at + 7])
        record += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history_of(file: Path) -> list[dict[str, Any]]:
    """The rows of one of Weights & Biases' transaction logs."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


def test_wandb_has_every_point_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(tmp_path / "run", "wandb")
    wandb.teardown()  # its service writes the last lines as it ends
    logs = sorted(
        run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns
    )
    assert len(logs) == 2  # of the process that was lost, and of the one that went on
    found: dict[str, list[tuple[int, float]]] = {}
    for row in history_of(logs[-1]):
        [axis] = {name for name in row if name == "server_round" or name.startswith("step/number")}
        for name, value in row.items():
            if name != axis and not name.startswith("_"):
                found.setdefault(name, []).append((row[axis], value))
    assert found == CURVES


def test_mlflow_has_every_point_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    run = train(tmp_path / "run", "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flower_split")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    assert [one.data.tags["run-dir"] for one in runs] == [str(run.path)] * 2
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, name)]
        for name in runs[0].data.metrics
    }
    assert found == CURVES
    assert runs[0].data.params["seed"] == "3" and runs[0].info.status == "FINISHED"


class Kept(MetricLogger):
    """Keeps what it is told; may break."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.told: list[Mapping[str, Json]] = []
        self.runs: list[LoggedRun] = []
        self.closed, self.breaks_at = 0, breaks_at

    def start(self, run: LoggedRun) -> None:
        self.runs.append(run)

    def log(self, record: Record) -> None:
        if len(self.told) == self.breaks_at:
            raise OSError("the service is gone")
        self.told.append(record)

    def close(self) -> None:
        self.closed += 1


def test_a_logger_that_breaks_is_left_out_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.create(RunConfig(run_dir=str(tmp_path / "run")))
    well, broken = Kept(), Kept(breaks_at=2)
    with caplog.at_level("WARNING", "flower_split"), logged(run, [broken, well]):
        append(run, 1, ROUND_1)
    assert well.told == run.metrics() and len(broken.told) == 2
    assert well.closed == broken.closed == 1
    assert [r.message for r in caplog.records if "told nothing more" in r.message] == [
        "Kept is told nothing more of this run, which goes on: OSError: the service is gone. "
        "metrics.jsonl has everything."
    ]
    append(run, 2, ROUND_2)  # after the block: nobody is told
    assert len(well.told) == len(ROUND_1)
    [about] = well.runs
    assert about.name == "run" and not about.resumed and about.config["seed"] == 0


def test_a_resumed_run_is_told_from_its_beginning(tmp_path: Path) -> None:
    run = RunDirectory.create(RunConfig(run_dir=str(tmp_path / "run")))
    append(run, 1, ROUND_1)
    again = Kept()
    with logged(run, [again]):
        append(run, 2, ROUND_2)
    assert again.told == run.metrics() and again.runs[0].resumed


def test_a_logger_that_cannot_begin_ends_the_run_and_closes_the_others(tmp_path: Path) -> None:
    class Refuses(Kept):
        def start(self, run: LoggedRun) -> None:
            raise ConfigError("no key")

    run = RunDirectory.create(RunConfig(run_dir=str(tmp_path / "run")))
    first, last = Kept(), Refuses()
    with pytest.raises(ConfigError, match="no key"):
        with logged(run, [first, last]):
            pytest.fail("it must not begin")
    assert (first.closed, last.closed) == (1, 0) and run.listeners == []


@pytest.mark.parametrize("name", sorted(LOGGERS.built_in))
def test_a_package_that_is_missing_is_an_error_that_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LOGGERS.built_in[name]
    assert issubclass(made, PackageLogger)
    monkeypatch.setattr(made, "package", "no_such_package")
    with pytest.raises(ConfigError, match=rf"pip install 'flower-split\[{name}\]'"):
        make_loggers(parse_run_config({"train.report-to": f" {name} "}))


def test_loggers_are_named_by_import_path_too(tmp_path: Path) -> None:
    source = (
        "from flower_split.runs.loggers.logger import MetricLogger\n"
        "class Mine(MetricLogger):\n"
        "    def start(self, run): pass\n"
        "    def log(self, record): pass\n"
        "    def close(self): pass\n"
        "class Half(MetricLogger): pass\n"
    )
    (tmp_path / "my_loggers.py").write_text(source)
    with installed(tmp_path):
        [made] = make_loggers(parse_run_config({"train.report-to": "my_loggers:Mine"}))
        assert type(made).__name__ == "Mine"
        with pytest.raises(ConfigError, match="'my_loggers:Half' cannot be made"):
            make_loggers(parse_run_config({"train.report-to": "my_loggers:Half"}))
    with pytest.raises(ConfigError, match="'tensorbord' is unknown.*Did you mean 'tensorboard'"):
        make_loggers(parse_run_config({"train.report-to": "tensorbord"}))
    assert make_loggers(RunConfig()) == []
