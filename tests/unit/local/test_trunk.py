"""The trunk of a local run, as a process that waits for its order."""

import subprocess

import pytest

from flower_split.local.nodes import ClientAppRef, NodeProcesses
from flower_split.local.trunk import ForkedTrunk


def test_trunk_without_an_order_waits_and_ends_when_it_is_closed(tmp_path) -> None:
    with ForkedTrunk.fork([]) as trunk:
        assert trunk.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            trunk.wait(0.05)
    assert trunk.returncode == 0


def test_trunk_keeps_no_node_from_ending(tmp_path) -> None:
    with NodeProcesses.fork(1, ClientAppRef("nowhere:app", tmp_path)) as nodes:
        with ForkedTrunk.fork(nodes.processes) as trunk:
            nodes.close()  # else it would be ended by force, and not with 0
            assert [node.exit_code for node in nodes.processes] == [0]
            assert trunk.poll() is None


def test_trunk_that_is_killed_tells_by_which_signal() -> None:
    with ForkedTrunk.fork([]) as trunk:
        trunk.kill()
        assert trunk.wait(10.0) == -9
