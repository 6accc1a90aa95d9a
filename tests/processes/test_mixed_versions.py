"""A federation that is upgraded node by node: one node has an older copy of the package."""

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.common.serde import context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

import flower_split
from flower_split.config import Scalar, parse_run_config
from flower_split.errors import FederationError
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from tests.processes.test_runs import adapters_of, digest
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.tiny_app import make_data, make_model, tiny_config

# The older node: reads a message and a context, each after its length, and writes its reply likewise.
_NODE = """
import os, struct, sys
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context, Message
from flower_split.client.app import app

answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # whatever prints must not print into the answers

def read(kind):
    head = sys.stdin.buffer.read(8)
    return kind.FromString(sys.stdin.buffer.read(*struct.unpack("<q", head))) if head else None

while (message := read(Message)) is not None:
    reply = app(message_from_proto(message), context_from_proto(read(Context)))
    payload = message_to_proto(reply).SerializeToString()
    answers.write(struct.pack("<q", len(payload)) + payload)
    answers.flush()
"""


def older_copy(folder: Path) -> Path:
    """Write a copy of the package from before the key ``report`` was there."""
    package = Path(flower_split.__file__).parent
    copy = folder / "flower_split"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "quickstart"))
    changes = {
        "runtime/version.py": [('__version__ = "0.1.0"', '__version__ = "0.0.9"')],
        "config/run.py": [('    report: str = "html"\n', '    _no_field = "html"\n')],
    }
    for name, pairs in changes.items():
        text = (copy / name).read_text()
        for before, after in pairs:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        (copy / name).write_text(text.replace("self.report.split", "self._no_field.split"))
    return folder


class MixedGrid(LocalGrid):
    """A grid whose node 100 is the older process."""

    def __init__(
        self, older: "subprocess.Popen[bytes]", num_clients: int, config: Mapping[str, Scalar]
    ) -> None:
        super().__init__(num_clients, config)
        self._older = older
        self.asked_older = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the other grid's, but for the older node's messages."""
        for name in sorted(message_ids, reverse=True):
            message = self._waiting.get(name)
            if message is not None and message.metadata.dst_node_id == 100:
                del self._waiting[name]
                return [self._ask_older(message)]
        return super().pull_messages(message_ids)

    def _ask_older(self, message: Message) -> Message:
        given, answers = self._older.stdin, self._older.stdout
        assert given is not None and answers is not None
        for part in (message_to_proto(message), context_to_proto(self.contexts[100])):
            payload = part.SerializeToString()
            given.write(struct.pack("<q", len(payload)) + payload)
        given.flush()
        [size] = struct.unpack("<q", answers.read(8))
        self.asked_older += 1
        reply = message_from_proto(ProtoMessage.FromString(answers.read(size)))
        reply.metadata.__dict__["_src_node_id"] = 100
        return reply


@pytest.fixture
def older(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, "PYTHONPATH": str(older_copy(tmp_path / "older"))}
    with (
        (tmp_path / "older.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", _NODE],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=20) == 0


@pytest.mark.slow  # a process that loads torch and Flower, and three runs
def test_a_node_of_an_older_version_trains_the_same_and_is_refused_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: "subprocess.Popen[bytes]"
) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)
    config = tiny_config(
        make_model(tmp_path / "model"),
        make_data(tmp_path / "data", 2),
        trunk__step_every="server-round",
        report="html",
    )

    mixed = {**config, "run-dir": str(tmp_path / "mixed")}
    grid = MixedGrid(older, 2, mixed)
    run(grid, parse_run_config(mixed))
    assert grid.asked_older >= 3  # handshake, evaluation, training
    log = (tmp_path / "older.log").read_text()
    assert log.count("flower-split 0.0.9 does not know these keys of the run config") == 1
    assert "leaves them out: report." in log
    report = (tmp_path / "mixed" / "report.md").read_text()
    assert "different versions of flower-split: " in report and "0.0.9 (partition 0)" in report

    same = {**config, "run-dir": str(tmp_path / "same")}
    run(LocalGrid(2, same), parse_run_config(same))
    assert digest(adapters_of(RunDirectory.open(tmp_path / "mixed"))) == digest(
        adapters_of(RunDirectory.open(tmp_path / "same"))
    )

    changed = {**config, "report": "", "run-dir": str(tmp_path / "changed")}
    with pytest.raises(
        FederationError,
        match=r"partition 0 \(node 100\) has flower-split 0\.0\.9, which does not know report \(here "
        r"'', by default 'html'\)\. Upgrade it there",
    ):
        run(MixedGrid(older, 2, changed), parse_run_config(changed))
