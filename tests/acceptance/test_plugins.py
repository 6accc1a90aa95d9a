"""A newcomer's tasks: each plug-in is one file of a distribution of its own, named in the run config."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flower_split.cli import preflight
from flower_split.cli.report import check_reports, write_reports_of
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import FlowerSplitError
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.support.distributions import install, installed
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_model, tiny_config

PROJECT = Path(__file__).parents[1] / "support" / "plugin_distribution"
CLIENTS = 3
NAMED: dict[str, Scalar] = {
    "strategy.aggregator": "median-lora",
    "strategy.rules": "heaviest=2",
    "trunk.wire-dtype": "row-int8",
    "trunk.transport": "measured",
    "data.source": "notes",
    "data.partitioner": "in-turn",
    "trunk.window-rule": "needs-first",
    "report": "rounds",
    "train.report-to": "losses",
}
GROUPS = {
    "strategy.aggregator": "flower_split.aggregators",
    "strategy.rules": "flower_split.rules",
    "trunk.wire-dtype": "flower_split.codecs",
    "trunk.transport": "flower_split.transports",
    "data.source": "flower_split.data_sources",
    "data.partitioner": "flower_split.partitioners",
    "trunk.window-rule": "flower_split.window_rules",
    "report": "flower_split.reports",
    "train.report-to": "flower_split.loggers",
}


@pytest.fixture(autouse=True)
def trunk_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[None]:
    install(PROJECT, tmp_path / "site")
    with installed(tmp_path / "site"):
        yield


def notes(path: Path) -> None:
    """A file for all clients, with a line that is no note."""
    lines = [f"- note {n} of {'abc'[n % 3] * (4 + n % 5)}" for n in range(8 * CLIENTS)]
    path.write_text("a title\n" + "\n".join(lines) + "\n")


def job(tmp_path: Path, name: str, **changes: Scalar) -> dict[str, Scalar]:
    model, data = tmp_path / "model", tmp_path / "notes.txt"
    if not model.exists():
        make_model(model)
        notes(data)
    return {
        **tiny_config(model, str(data), num_clients=CLIENTS),
        "trunk.step-every": "server-round",
        "run-dir": str(tmp_path / name),
        **NAMED,
        **changes,
    }


def finished(config: dict[str, Scalar]) -> RunDirectory:
    run(LocalGrid(CLIENTS, config), parse_run_config(config))
    return RunDirectory.open(Path(str(config["run-dir"])))


def test_a_run_uses_every_plug_in_that_its_config_names(
    tmp_path: Path, plugins: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "newcomer.measured")
    config = job(tmp_path, "run")
    preflight.check_aggregation(parse_run_config(config))
    preflight.check_trunk(parse_run_config(config))
    check_reports(parse_run_config(config))
    done = finished(config)
    methods = {record.args[0] for record in caplog.records if record.name == "newcomer.measured"}
    assert methods == {"Forward", "Backward"}
    plain = finished(job(tmp_path, "plain", **{"trunk.wire-dtype": "native"}))
    mean = finished(job(tmp_path, "mean", **{"strategy.aggregator": "fedit"}))
    everybody = finished(job(tmp_path, "everybody", **{"strategy.rules": ""}))
    assert {record["partition_id"] for record in done.metrics("step")} == set(range(CLIENTS))
    adapter = done.read_adapter("client")
    assert all(bool(torch.isfinite(value).all()) for value in adapter.values())
    shuffled = finished(job(tmp_path, "shuffled", **{"data.partitioner": "iid"}))
    # Each of them has been at work: the run without it ends elsewhere.
    for other in (plain, mean, everybody, shuffled):
        theirs = other.read_adapter("client")
        assert adapter.keys() == theirs.keys()
        assert any(not torch.equal(adapter[name], theirs[name]) for name in adapter)
    sent = [sum(r["bytes_sent"] for r in one.metrics("step")) for one in (done, plain)]
    assert sent[0] < 0.5 * sent[1]  # a byte instead of four, and what else goes with a call
    write_reports_of(done.path)
    lines = (done.path / "rounds.csv").read_text().splitlines()
    measured = [f"run,{r['server_round']},{r['perplexity']}" for r in done.metrics("round")]
    assert lines == ["run,round,perplexity", *measured] and len(measured) == 2
    assert not (done.path / "report.html").exists()
    told = (done.path / "losses.txt").read_text().splitlines()
    assert told == [
        f"{r['partition_id']} {r['server_round']} {r['loss']}" for r in done.metrics("step")
    ]


@pytest.mark.parametrize("key", NAMED)
def test_without_the_distribution_its_names_are_refused(tmp_path: Path, key: str) -> None:
    known = {
        "strategy.aggregator": "fedit",
        "strategy.rules": "",
        "trunk.wire-dtype": "native",
        "trunk.transport": "grpc",
        "data.partitioner": "iid",
        "trunk.window-rule": "quorum",
        "report": "html",
        "train.report-to": "",
    }
    changes = {other: value for other, value in known.items() if other != key}
    if key != "data.source":
        changes["data.source"] = "text"
    config = job(tmp_path, "run", **changes)
    name = str(NAMED[key]).partition("=")[0]
    with pytest.raises(FlowerSplitError, match=f"'{name}' is unknown.*{GROUPS[key]}"):
        check_reports(parse_run_config(config))
        run(LocalGrid(CLIENTS, config), parse_run_config(config))


def test_each_plug_in_is_one_file_and_one_line_and_names_nothing_of_the_package() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(declared) == set(GROUPS.values())
    modules = [value.partition(":")[0] for points in declared.values() for value in points.values()]
    files = {path.stem for path in (PROJECT / "newcomer").glob("*.py")} - {"__init__"}
    assert {module.removeprefix("newcomer.") for module in modules} == files
    assert len(modules) == len(files) == len(GROUPS)
    package = Path(preflight.__file__).parents[1]
    assert not [file for file in package.rglob("*.py") if "newcomer" in file.read_text()]
    for stem in files:  # none imports another
        text = (PROJECT / "newcomer" / f"{stem}.py").read_text()
        assert "newcomer" not in text
