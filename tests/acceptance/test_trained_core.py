"""Fed-SB in a federation with real clients and a real trunk: from round 3 on, R of B = P R trains."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.aggregation.core.client_updates import Transform
from flower_split.aggregation.core.round_summary import RoundSummary
from flower_split.config import parse_run_config
from flower_split.server.app import run
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config


def test_clients_of_fed_sb_return_b_in_the_columns_they_were_sent_from_the_third_round_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[Sequence[AdapterUpdate]] = []
    plain = AdapterAggregator.aggregate

    def recorded(
        self: AdapterAggregator, updates: Sequence[AdapterUpdate], then: Sequence[Transform] = ()
    ) -> RoundSummary:
        rounds.append(updates)
        return plain(self, updates, then)

    monkeypatch.setattr(AdapterAggregator, "aggregate", recorded)
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    config = {
        **tiny_config(
            make_model(tmp_path / "model"),
            make_data(tmp_path / "data", 2),
            strategy__aggregator="fed-sb",
            num_server_rounds=3,
        ),
        "run-dir": str(tmp_path / "run"),
    }
    run(LocalGrid(2, config), parse_run_config(config))
    moved: list[dict[str, bool]] = []
    for updates in rounds:
        moved.append({})
        for update in updates:
            for name, sent in update.received.items():
                side = name[-8:]  # A.weight or B.weight
                changed = not torch.equal(sent, update.returned[name])
                moved[-1][side] = moved[-1].get(side, False) or changed
    assert moved == [
        {"A.weight": False, "B.weight": True},
        {"A.weight": True, "B.weight": False},
        {"A.weight": False, "B.weight": True},
    ]
    for update in rounds[2]:
        for name, sent in update.received.items():
            if name.endswith("lora_B.weight"):
                columns = torch.linalg.qr(sent.double()).Q
                change = update.returned[name].double() - sent.double()
                beside = change - columns @ (columns.T @ change)
                assert float(beside.norm() / change.norm()) < 1e-2  # 0.9 where B itself trains
