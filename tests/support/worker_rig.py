"""Workers of a small ClientApp, over real sockets; every process is ended and waited for."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_split.client.worker.asking import Patience, ReadyWorker, Start, launch, start_worker
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.identity import WorkerIdentity, process_mark

COUNTING = '''
"""Counts what its process has answered; holds on where it is told to; raises on evaluation."""

import os
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flower_split.client.app import SplitClientApp

app = SplitClientApp()
count = 0


@app.train()
def train(message, context):
    global count
    count += 1
    before = context.state.metric_records.get("seen", {"rounds": 0})["rounds"]
    context.state["seen"] = MetricRecord({"rounds": before + 1})
    facts = {"pid": os.getpid(), "count": count, "echo": message.content["said"]["word"]}
    return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)


@app.query()
def query(message, context):
    with open(message.content["said"]["word"]) as gate:
        gate.read()
    return train(message, context)


@app.evaluate()
def evaluate(message, context):
    raise ValueError("labels are missing")
'''
PROJECT = '[tool.flwr.app.components]\nclientapp = "counting_client:app"\n'


class WorkerRig:
    """An app's folder, the workers' directory, and the workers started from here."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "app"
        self.folder.mkdir()
        (self.folder / "counting_client.py").write_text(COUNTING)
        (self.folder / "pyproject.toml").write_text(PROJECT)
        self.directory = WorkerDirectory.open(root / "workers")
        self.pids: list[int] = []
        self.idle = 600.0
        self.node = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ends with its input
        self.identity = WorkerIdentity(
            code="1",
            app="counting_client:app",
            folder=str(self.folder),
            app_files="1",
            run=5,
            node_process=process_mark(self.node.pid),
            interpreter=sys.executable,
            import_path=tuple(path for path in sys.path if path),
        )

    def get(self, node: int = 7, patience: Patience | None = None, **other: object) -> ReadyWorker:
        """The node's worker for the rig's identity, with ``other`` fields."""
        identity = replace(self.identity, **other)  # type: ignore[arg-type]
        return ReadyWorker.get(self.directory, node, identity, start=self._start, patience=patience)

    def train(self, node: int = 7, **other: object) -> Mapping[str, object]:
        """What the worker says of itself in answer to one training message."""
        with self.get(node, **other) as worker:
            return facts_of(worker.answer(message("train"), context(node)))

    def start_beforehand(self, node: int = 7, code: str = "1") -> None:
        """Start a worker that waits for its first run, as ``flower-split worker`` does."""
        lock = self.directory.lock(node)
        assert lock is not None
        waiting = replace(WorkerIdentity.waiting(), code=code, app="json")  # torch takes seconds
        launch(self.directory, node, waiting, lock, self._start)

    def _start(self, start: Start) -> None:
        self.pids.append(start_worker(start, self.idle))

    def end_node(self) -> None:
        """End the process that the workers are to end with."""
        assert self.node.stdin is not None
        self.node.stdin.close()
        self.node.wait(timeout=10)

    def exit_code(self, pid: int) -> int:
        """Wait for a worker's end; negative: the signal."""
        process = os.pidfd_open(pid)
        try:
            ended, _, _ = select.select([process], [], [], 20)
            assert ended, f"worker {pid} does not end"
        finally:
            os.close(process)
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        """End everything."""
        for pid in list(self.pids):
            os.kill(pid, signal.SIGKILL)
            self.exit_code(pid)
        if self.node.returncode is None:
            self.end_node()
        self.directory.close()


def message(kind: str, word: str = "hello") -> Message:
    """A message as Flower's process gets it."""
    made = Message(RecordDict({"said": ConfigRecord({"word": word})}), 7, kind)
    made.metadata.__dict__["_message_id"] = f"message of {kind}"
    return made


def context(node: int = 7) -> Context:
    """A node's context, with no state yet."""
    return Context(5, node, {"partition-id": 0}, RecordDict(), {"seed": 3})


def facts_of(reply: Message) -> Mapping[str, object]:
    """What the app says of itself."""
    assert not reply.has_error(), reply.error
    return dict(reply.content.config_records["facts"])
