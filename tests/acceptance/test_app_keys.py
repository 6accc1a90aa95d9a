"""A run with keys of the app's own: its data source, its strategy and its mod have them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp.strategy import FedAvg, Strategy

from flower_split.client.app import make_client_app
from flower_split.config import Scalar, parse_run_config
from flower_split.data import DataSource, Record, SourceRecords, SourceRequest
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.server.inner.flower_strategies import InnerContext
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_model, tiny_config

ASKED: list[tuple[int, Mapping[str, Scalar]]] = []  # what each client's data source was given


class Topics(DataSource):
    def read(self, request: SourceRequest) -> SourceRecords:
        ASKED.append((request.partition_id, request.app))
        topic = str(request.app["data.Topic_Name"])
        records = [Record(f"note {n}", {"text": f"{topic} {n}" * 3}) for n in range(8)]
        return SourceRecords(records=records, where="memory", own=True, name=topic)


def test_a_run_hands_the_apps_keys_to_the_apps_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    ASKED.clear()
    seen: dict[str, object] = {}

    def inner(context: InnerContext) -> Strategy:
        seen["strategy"] = context.config.app
        return FedAvg(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key=str(context.config.app["weigh_by"]),
        )

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        seen["mod"] = context.run_config["app.data.Topic_Name"]
        return call_next(message, context)

    config = {
        **tiny_config(make_model(tmp_path / "model"), "unused"),
        "trunk.step-every": "server-round",
        "data.source": f"{__name__}:Topics",
        "run-dir": str(tmp_path / "run"),
        "app.data.Topic_Name": "sea",
        "app.weigh_by": "num-examples",
    }
    run(LocalGrid(2, config, make_client_app([mod])), parse_run_config(config), inner)

    own = {"data.Topic_Name": "sea", "weigh_by": "num-examples"}
    assert seen == {"strategy": own, "mod": "sea"}
    assert {slot for slot, _ in ASKED} == {0, 1} and all(app == own for _, app in ASKED)
    done = RunDirectory.open(tmp_path / "run")
    assert {record["name"] for record in done.metrics("data")} == {"sea"}
    assert done.config.app == own
