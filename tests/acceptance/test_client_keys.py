"""A whole run whose tokens are bound to the clients' keys, and a SuperNode that loses its own."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from flower_split.client.app import app
from flower_split.config import Scalar, parse_run_config
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import make_data, make_model, tiny_config

TOKEN = "a coordinator token of the tests"
FORGETFUL = 101


class Forgetting(LocalGrid):
    """One SuperNode starts again, without its memory, before it gets its first training order."""

    def __init__(self, config: dict[str, Scalar], *, forgets: bool) -> None:
        super().__init__(2, config, app)
        self.forgets = forgets
        self.kinds: list[tuple[int, str]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for message in sent:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.kinds.append((node, kind))
            if self.forgets and (node, kind) == (FORGETFUL, "train"):
                self.contexts[node].state = RecordDict()
                self.forgets = False
        return super().push_messages(sent)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    folder = tmp_path_factory.mktemp("keys")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    data = make_data(folder / "data", 2)
    made = tiny_config(make_model(folder / "model"), data, trunk__step_every="server-round")
    return {**made, "trunk.token-file": str(token)}


def trained(config: dict[str, Scalar], folder: Path, *, forgets: bool) -> tuple[str, Forgetting]:
    """The digests of a run's adapters, and its grid."""
    audit = folder / "audit.jsonl"
    folder.mkdir()
    with RunningTrunk(
        parse_run_config(config), Serving(token=TOKEN, audit_log=str(audit))
    ) as trunk:
        config = {
            **config,
            "trunk.address": f"127.0.0.1:{trunk.port}",
            "run-dir": str(folder / "run"),
        }
        grid = Forgetting(config, forgets=forgets)
        run(grid, parse_run_config(config))
    directory = RunDirectory.open(folder / "run")
    tensors = {
        part: {name: value.tolist() for name, value in directory.read_adapter(part).items()}
        for part in ("client", "trunk")
    }
    outcomes = [json.loads(line)["outcome"] for line in audit.read_text().splitlines()]
    assert "REFUSED" not in outcomes  # the client finds out by itself
    return json.dumps(tensors, sort_keys=True), grid


def test_lost_key_costs_one_attempt_and_changes_no_bit(
    config: dict[str, Scalar], tmp_path: Path
) -> None:
    plain, quiet = trained(config, tmp_path / "plain", forgets=False)
    again, grid = trained(config, tmp_path / "again", forgets=True)
    assert again == plain
    assert quiet.kinds.count((FORGETFUL, "query")) == 1
    assert grid.kinds.count((FORGETFUL, "query")) == 2  # asked for its new key
    trains = [kind for kind in grid.kinds if kind[1] == "train"]
    assert len(trains) == len([kind for kind in quiet.kinds if kind[1] == "train"]) + 2


def test_tokens_of_a_run_name_the_keys_that_the_nodes_keep(
    config: dict[str, Scalar], tmp_path: Path
) -> None:
    _, grid = trained(config, tmp_path / "run", forgets=False)
    tokens = {
        node: {
            value
            for message in grid.pushed
            if message.metadata.dst_node_id == node
            for record in message.content.config_records.values()
            for key, value in record.items()
            if key == "flower-split.trunk-token"
        }
        for node in grid.nodes
    }
    named = {node: {token.rpartition(".")[2] for token in found} for node, found in tokens.items()}
    assert all(len(found) == 3 for found in tokens.values())  # two evaluations and a training
    assert all(len(keys) == 1 and len(min(keys)) == 43 for keys in named.values())
    assert named[100] != named[FORGETFUL]
