"""A node's worker: what it keeps, when it is replaced, and when it ends."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.common.serde import context_to_proto, message_to_proto

from flower_split.cli.worker import show_workers, start_beforehand
from flower_split.client.worker import frames
from flower_split.client.worker.asking import Patience, ReadyWorker, Start, start_worker
from flower_split.client.worker.frames import Frame
from flower_split.client.worker.identity import process_mark
from flower_split.client.worker.state import ask_worker
from flower_split.errors import ConfigError, WorkerError
from tests.support.worker_rig import WorkerRig, context, facts_of, message


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[WorkerRig]:
    rig = WorkerRig(tmp_path)
    try:
        yield rig
    finally:
        rig.close()


class Held:
    """A message that a worker computes until :meth:`let_go`."""

    def __init__(self, worker: ReadyWorker, gate: Path) -> None:
        os.mkfifo(gate)
        self.reply: Message | None = None
        self.error: Exception | None = None
        self._worker = worker
        self._thread = threading.Thread(target=self._ask, args=(str(gate),))
        self._thread.start()
        self._gate = gate.open("w")  # returns when the handler has opened its end

    def _ask(self, gate: str) -> None:
        try:
            self.reply = self._worker.answer(message("query", gate), context())
        except WorkerError as error:
            self.error = error

    def let_go(self) -> None:
        self._gate.close()

    def wait(self) -> "Held":
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return self


def test_messages_of_a_run_are_answered_by_one_process_that_is_not_this_one(rig: WorkerRig) -> None:
    first, second = rig.train(), rig.train()
    assert first == {"pid": rig.pids[0], "count": 1, "echo": "hello"}
    assert second == {"pid": rig.pids[0], "count": 2, "echo": "hello"}
    assert len(rig.pids) == 1


def test_reply_and_state_are_those_of_the_app_in_this_process(rig: WorkerRig) -> None:
    asked, node = message("train", "more"), context()
    with rig.get() as worker:
        reply = worker.answer(asked, node)
    with rig.get() as worker:
        worker.answer(message("train"), node)
    assert node.state.metric_records["seen"]["rounds"] == 2  # went there and back, twice
    assert facts_of(reply)["echo"] == "more"
    assert reply.metadata.reply_to_message_id == "message of train"
    assert reply.metadata.dst_node_id == asked.metadata.src_node_id
    assert (reply.metadata.message_type, reply.metadata.run_id) == ("train", asked.metadata.run_id)


def test_what_the_app_raises_comes_back_in_flowers_words_and_the_worker_stays(
    rig: WorkerRig,
) -> None:
    with rig.get() as worker:
        reply = worker.answer(message("evaluate"), context())
    assert reply.has_error()
    assert reply.error.reason == "<class 'ValueError'>:<'labels are missing'>"
    assert rig.train()["pid"] == rig.pids[0]


def test_app_that_cannot_be_loaded_is_an_error_of_the_reply(rig: WorkerRig) -> None:
    with rig.get(app="nowhere:app") as worker:
        reply = worker.answer(message("train"), context())
    assert "No module named 'nowhere'" in str(reply.error.reason)


def test_two_nodes_of_a_machine_have_a_worker_each(rig: WorkerRig) -> None:
    assert rig.train(7)["pid"] != rig.train(8)["pid"]
    assert (rig.train(7)["count"], rig.train(8)["count"]) == (2, 2)
    assert rig.directory.nodes() == [7, 8]


def test_worker_of_another_run_ends_and_a_new_one_answers(rig: WorkerRig) -> None:
    before, after = rig.train(), rig.train(run=6)
    assert after["count"] == 1 and after["pid"] != before["pid"]
    assert rig.exit_code(rig.pids[0]) == 0


def test_worker_started_beforehand_becomes_the_first_runs_and_ends_with_its_node(
    rig: WorkerRig,
) -> None:
    rig.start_beforehand()
    before = ask_worker(rig.directory, 7)
    assert before is not None and (before.run, before.answered) == (0, 0)
    first, second = rig.train(), rig.train()
    assert first["pid"] == second["pid"] == before.pid == rig.pids[0]
    after = ask_worker(rig.directory, 7)
    assert after is not None and (after.run, after.answered) == (5, 2)
    rig.end_node()
    assert rig.exit_code(rig.pids[0]) == 0


def test_worker_started_beforehand_with_other_code_is_replaced(rig: WorkerRig) -> None:
    rig.start_beforehand(code="of another version")
    assert rig.train()["pid"] == rig.pids[1]
    assert rig.exit_code(rig.pids[0]) == 0


def test_command_starts_one_worker_and_says_where_there_is_one(
    rig: WorkerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(given: Start) -> None:
        rig.pids.append(start_worker(given, 60.0))

    folder = rig.directory.path
    assert start_beforehand(7, idle=60.0, folder=folder, start=start) == 0
    assert "node 7: a worker waits for the first message, 60 s at most" in capsys.readouterr().out
    with pytest.raises(WorkerError, match="node 7 has a worker"):
        start_beforehand(7, idle=60.0, folder=folder, start=start)
    with pytest.raises(ConfigError, match="needs the node's id"):
        start_beforehand(None, idle=60.0, folder=folder, start=start)
    assert show_workers(7, folder=folder) == 0
    assert f"node 7: process {rig.pids[0]}, no run yet, 0 messages" in capsys.readouterr().out
    assert show_workers(7, end=True, folder=folder) == 0
    assert rig.exit_code(rig.pids[0]) == 0


def test_worker_killed_between_messages_is_replaced(rig: WorkerRig) -> None:
    before = rig.pids[0] if rig.train() else 0
    os.kill(before, signal.SIGKILL)
    assert rig.exit_code(before) == -signal.SIGKILL
    assert rig.train()["count"] == 1


def test_worker_killed_at_work_is_an_error_in_words_and_the_next_one_answers(
    rig: WorkerRig, tmp_path: Path
) -> None:
    with rig.get() as worker:
        held = Held(worker, tmp_path / "gate")
        os.kill(rig.pids[0], signal.SIGKILL)
        error = held.wait().error
    held.let_go()
    assert isinstance(error, WorkerError)
    assert "a sign of the worker, which computes,: the connection was closed" in str(error)
    assert rig.exit_code(rig.pids[0]) == -signal.SIGKILL
    assert rig.train()["count"] == 1


def test_silent_worker_is_ended_before_anybody_else_may_compute(
    rig: WorkerRig, tmp_path: Path
) -> None:
    with rig.get(patience=Patience(silence=1.0)) as worker:
        held = Held(worker, tmp_path / "gate")
        os.kill(rig.pids[0], signal.SIGSTOP)
        error = held.wait().error
        assert rig.exit_code(rig.pids[0]) == -signal.SIGKILL  # gone when the error is raised
    held.let_go()
    assert "did not come within 1 s" in str(error)


def test_worker_at_work_for_another_caller_says_so_and_goes_on(
    rig: WorkerRig, tmp_path: Path
) -> None:
    with rig.get() as worker:
        held = Held(worker, tmp_path / "gate")
        with pytest.raises(WorkerError, match="at work on another message .of run 5"):
            rig.get(run=6)
        held.let_go()
        reply = held.wait().reply
    assert reply is not None and facts_of(reply)["count"] == 1
    assert rig.train()["count"] == 2


def test_worker_ends_when_nobody_waits_for_its_reply(rig: WorkerRig, tmp_path: Path) -> None:
    rig.train()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    caller = rig.directory.connect(7, 10)
    assert caller is not None
    with caller:
        frames.send(caller, Frame("answer", {"identity": rig.identity.write()}), 10, "a test")
        assert frames.receive(caller, 10, "a test").kind == "ready"
        asked = message_to_proto(message("query", str(gate))).SerializeToString()
        node = context_to_proto(context()).SerializeToString()
        frames.send(caller, Frame("message", {"task": 1}, (node, asked)), 10, "a test")
        with gate.open("w"):  # the handler has opened its end
            caller.close()
            assert rig.exit_code(rig.pids[0]) == 0


def test_worker_ends_with_its_node(rig: WorkerRig) -> None:
    rig.train()
    rig.end_node()
    assert rig.exit_code(rig.pids[0]) == 0
    assert rig.directory.nodes() == []


def test_worker_stays_when_another_node_of_the_machine_ends(rig: WorkerRig) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        rig.train(7)
        rig.train(8, node_process=process_mark(other.pid))
        rig.end_node()
        assert rig.exit_code(rig.pids[0]) == 0
        assert rig.train(8, node_process=process_mark(other.pid))["count"] == 2


def test_worker_at_work_ends_with_its_node(rig: WorkerRig, tmp_path: Path) -> None:
    with rig.get() as worker:
        held = Held(worker, tmp_path / "gate")
        rig.end_node()
        assert rig.exit_code(rig.pids[0]) == 0
        assert isinstance(held.wait().error, WorkerError)
    held.let_go()


def test_worker_ends_after_a_time_without_messages(rig: WorkerRig) -> None:
    rig.idle = 0.2
    rig.train()
    assert rig.exit_code(rig.pids[0]) == 0
    assert rig.directory.nodes() == []


def test_worker_of_a_node_that_has_ended_does_not_start(rig: WorkerRig) -> None:
    rig.end_node()
    with pytest.raises(WorkerError, match="ended as it started"):
        rig.get()


def test_interpreter_that_is_gone_is_an_error_in_words(rig: WorkerRig) -> None:
    with pytest.raises(WorkerError, match="no worker can be started: .*No such file"):
        rig.get(interpreter="/nowhere/python")
