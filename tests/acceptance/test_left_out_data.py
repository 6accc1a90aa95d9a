"""What is left out of the clients' data is counted in the log and the report of a run."""

import json
import logging
from pathlib import Path

import pytest

from flower_split.config import parse_run_config
from flower_split.errors import FederationError
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config


@pytest.fixture(autouse=True)
def trunk_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)


def test_run_leaves_out_a_small_client_and_bad_records_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(tmp_path / "data", 3)
    small, mixed = (Path(data.replace("{partition_id}", number)) for number in "01")
    small.write_text(small.read_text().splitlines()[0] + "\n")  # one example alone
    long = json.dumps({"prompt": "x" * 70, "completion": "y"})  # 72 tokens in a window of 64
    mixed.write_text(mixed.read_text() + '{"prompt": "\\ud800", "completion": "a"}\n' + long + "\n")
    config = tiny_config(make_model(tmp_path / "model"), data, num_clients=3)
    config |= {"run-dir": str(tmp_path / "run"), "trunk.step-every": "server-round"}
    with pytest.raises(FederationError, match="partition 0 of 3: .*two different documents"):
        run(LocalGrid(3, config), parse_run_config(config))
    config |= {"data.on-bad-record": "skip", "data.on-small-client": "skip"}
    config |= {"run-dir": str(tmp_path / "again")}
    logger = logging.getLogger("flower_split")  # it does not pass on to pytest's own
    logger.addHandler(caplog.handler)
    try:
        run(LocalGrid(3, config), parse_run_config(config))
    finally:
        logger.removeHandler(caplog.handler)
    done = RunDirectory.open(tmp_path / "again")
    assert {record["partition_id"] for record in done.metrics("step")} == {1, 2}
    notes = " ".join(
        path.read_text() for path in done.path.iterdir() if path.suffix in (".md", ".json")
    )
    for said in (
        "Partition 0 takes no part in this run (data.on-small-client = skip): ",
        "Partition 1: 1 bad records were left out (data.on-bad-record); 1 examples were longer than "
        "train.sequence-length and lost 8 tokens.",
    ):
        assert said in caplog.text and said in notes
    assert "Partition 2: " not in notes


def test_run_in_which_all_clients_are_too_small_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 2)
    for number in "01":
        Path(data.replace("{partition_id}", number)).write_text("")
    config = tiny_config(make_model(tmp_path / "model"), data)
    config |= {"run-dir": str(tmp_path / "run"), "data.on-small-client": "skip"}
    with pytest.raises(FederationError, match="all 2 clients have too little data"):
        run(LocalGrid(2, config), parse_run_config(config))
