"""The grid of a local run, over processes that are none."""

import threading
from collections.abc import Callable, Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_split.errors import FederationError
from flower_split.local.grid import LocalGrid
from flower_split.local.nodes import NodeLost, NodeProcess, NodeProcesses

SECONDS = 10.0  # an answer takes microseconds; only a hang comes here


class FakeProcess(NodeProcess):
    """Answers with its name, its node's partition, and how often that node was asked before."""

    def __init__(self, name: str, hold: Callable[[Message], None] = lambda _: None) -> None:
        self.name = name
        self.hold = hold

    def ask(self, message: Message, context: Context) -> tuple[Message, Context]:
        self.hold(message)
        record = context.state.config_records.setdefault("asked", ConfigRecord({"count": 0}))
        count = int(str(record["count"]))
        record["count"] = count + 1
        content = {
            "by": self.name,
            "partition": context.node_config["partition-id"],
            "before": count,
        }
        reply = RecordDict({"answer": ConfigRecord(content)})
        return Message(reply, reply_to=message), context


def grid_of(processes: Iterable[FakeProcess], num_nodes: int) -> LocalGrid:
    return LocalGrid(NodeProcesses(list(processes)), num_nodes, {"a.key": 1})


def ask(grid: LocalGrid, nodes: Iterable[int]) -> list[tuple[int, str, int]]:
    """``(partition, process, asked before)`` of every node, by partition."""
    messages = [Message(RecordDict(), node, "query") for node in nodes]
    replies = grid.send_and_receive(messages, timeout=SECONDS)
    found = [reply.content.config_records["answer"] for reply in replies]
    return sorted((int(str(r["partition"])), str(r["by"]), int(str(r["before"]))) for r in found)


def test_grid_gives_every_node_its_partition_and_keeps_its_state() -> None:
    grid = grid_of([FakeProcess("a"), FakeProcess("b")], 3)
    nodes = list(grid.get_node_ids())
    assert [(p, before) for p, _, before in ask(grid, nodes)] == [(0, 0), (1, 0), (2, 0)]
    assert [(p, before) for p, _, before in ask(grid, nodes)] == [(0, 1), (1, 1), (2, 1)]


def test_grid_asks_all_nodes_at_once_where_there_are_as_many_processes() -> None:
    together = threading.Barrier(3, timeout=SECONDS)  # broken, unless three answer at a time
    processes = [FakeProcess(name, lambda _: together.wait() and None) for name in "abc"]
    grid = grid_of(processes, 3)
    assert len(ask(grid, grid.get_node_ids())) == 3


def test_grid_leaves_a_node_with_the_process_that_has_its_data() -> None:
    grid = grid_of([FakeProcess(name) for name in "abc"], 3)
    nodes = list(grid.get_node_ids())
    first = {partition: by for partition, by, _ in ask(grid, nodes)}
    for _ in range(3):
        for node in reversed(nodes):  # one at a time, so that all processes are idle
            (partition, by, _) = ask(grid, [node])[0]
            assert by == first[partition]


def test_grid_that_is_prepared_has_every_node_wait_for_the_process_that_loads_its_data() -> None:
    asked, free = threading.Barrier(3, timeout=SECONDS), threading.Event()

    def load(_: Message) -> None:
        if not free.is_set():
            asked.wait()
            free.wait(SECONDS)

    grid = grid_of([FakeProcess(name, load) for name in "ab"], 2)
    grid.prepare()
    asked.wait()  # both load
    nodes = list(grid.get_node_ids())
    messages = [Message(RecordDict(), node, "query") for node in nodes]
    names = list(grid.push_messages(messages))
    assert list(grid.pull_messages(names)) == []
    free.set()
    first = ask(grid, nodes)
    assert sorted(by for _, by, _ in first) == ["a", "b"]
    assert [before for _, _, before in first] == [2, 2]  # each was asked by the same one before


def test_grid_answers_for_a_process_that_died_and_goes_on_with_the_others() -> None:
    def die(_: Message) -> None:
        raise NodeLost("exit code -9")

    grid = grid_of([FakeProcess("dead", die)], 2)
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=SECONDS))
    reasons = sorted(reply.error.reason for reply in replies)
    assert "exit code -9" in reasons[0] and "no process is left" in reasons[1]
    later = list(grid.send_and_receive([Message(RecordDict(), 1, "query")], timeout=SECONDS))
    assert "no process is left" in later[0].error.reason

    grid = grid_of([FakeProcess("dead", die), FakeProcess("alive")], 2)
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=SECONDS))
    assert sorted(reply.has_error() for reply in replies) == [False, True]
    assert [by for _, by, _ in ask(grid, grid.get_node_ids())] == ["alive", "alive"]


def test_grid_returns_what_came_in_time() -> None:
    free = threading.Event()
    grid = grid_of([FakeProcess("slow", lambda _: free.wait(SECONDS) and None)], 1)
    assert list(grid.send_and_receive([Message(RecordDict(), 1, "query")], timeout=0.1)) == []
    free.set()


def test_grid_has_no_run_of_a_superlink() -> None:
    grid = grid_of([FakeProcess("a")], 1)
    with pytest.raises(FederationError, match="without --local"):
        _ = grid.run
