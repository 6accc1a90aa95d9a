"""A run whose operator revokes a client: its rounds are committed by the others."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from flower_split.cli.main import main
from flower_split.config import Scalar, parse_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import make_data, make_model, tiny_config

TOKEN = "a coordinator's token of enough characters"


class RevokingGrid(LocalGrid):
    """Has the operator revoke partition 1 just before that client first trains."""

    def __init__(self, config: dict[str, Scalar], revoke: list[str]) -> None:
        super().__init__(2, config)
        self._revoke, self.revoked = revoke, 0
        self.asked = 0  # partition 1, to train

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            metadata = message.metadata
            self.asked += metadata.message_type == "train" and metadata.dst_node_id == 101
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [self._waiting[name] for name in message_ids if name in self._waiting]
        training = [m for m in waiting if m.metadata.message_type == "train"]
        if not self.revoked and any(m.metadata.dst_node_id == 101 for m in training):
            self.revoked += 1
            assert main(self._revoke) == 0
        return super().pull_messages(message_ids)


def test_rounds_are_committed_without_the_client_that_was_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    changes = {"trunk__step_every": "server-round", "trunk__quorum": 0.5, "num_server_rounds": 2}
    config: dict[str, Scalar] = {
        **tiny_config(model, data, **changes),
        "run-dir": str(tmp_path / "run"),
        "trunk.token-file": str(token),
    }
    with RunningTrunk(parse_run_config(config), Serving(token=TOKEN)) as trunk:
        address = config["trunk.address"] = f"127.0.0.1:{trunk.port}"
        revoke = ["trunk-revoke", str(address), "--token-file", str(token), "--slot", "1"]
        grid = RevokingGrid(config, revoke)
        run(grid, parse_run_config(config))
        assert trunk.engine.status().process.rounds_committed == 2
        assert trunk.engine.status().process.rounds_aborted == 0
    assert grid.revoked == 1
    assert "slot 1 is out" in capsys.readouterr().out
    rows = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    trained = [row["partition_id"] for row in rows if row["kind"] == "step"]
    assert trained == [0, 0]  # a step in either round, and none of partition 1
    assert [row["clients"] for row in rows if row["kind"] == "aggregation"] == [["0"], ["0"]]
    evaluated = [row["evaluated"] for row in rows if row["kind"] == "round"]
    assert evaluated == [[0, 1], [0], [0]]
    assert RunDirectory.open(tmp_path / "run").read_adapter("trunk")


def test_asynchronous_run_asks_a_client_that_was_revoked_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    changes: dict[str, Scalar] = {
        "strategy__name": "fedbuff",
        "strategy__aggregator": "product-delta",
        "strategy__buffer_size": 1,
        "trunk__step_every": "server-round",
        "trunk__quorum": 0.5,
        "num_server_rounds": 4,
        "round_retries": 5,
    }
    config: dict[str, Scalar] = {
        **tiny_config(model, data, **changes),
        "run-dir": str(tmp_path / "run"),
        "trunk.token-file": str(token),
    }
    with RunningTrunk(parse_run_config(config), Serving(token=TOKEN)) as trunk:
        address = config["trunk.address"] = f"127.0.0.1:{trunk.port}"
        revoke = ["trunk-revoke", str(address), "--token-file", str(token), "--slot", "1"]
        grid = RevokingGrid(config, revoke)
        run(grid, parse_run_config(config))
        assert trunk.engine.status().revoked == (1,)
        assert trunk.engine.status().process.rounds_committed == 4
    assert (grid.revoked, grid.asked) == (1, 1)
    assert "slot 1 is out" in capsys.readouterr().out
    rows = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert {row["partition_id"] for row in rows if row["kind"] == "step"} == {0}
