"""A run on which everything fails once ends as one on which nothing did; and the rig's own parts."""

import socket
import threading
from pathlib import Path

import pytest

from tests.deployment.__main__ import table
from tests.deployment.faults import Seen, trunk_faults
from tests.deployment.federation import shifted_clock
from tests.deployment.federation_faults import federation_faults
from tests.deployment.gate import Gate


@pytest.mark.timeout(3600)
@pytest.mark.slow  # real processes and their restarts: two minutes, more on a busy machine
def test_every_fault_is_seen_and_each_round_ends_on_the_hashes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    rows = trunk_faults(tmp_path)
    print(table(rows))
    assert len(rows) == 8
    assert [row.fault for row in rows if not row.same] == [
        "a run with other weights than the trunk's"
    ]
    assert all(row.seen for row in rows)


@pytest.mark.timeout(3600)
@pytest.mark.slow  # a process for every message, and Flower's minute until a SuperNode may come back
def test_flowers_own_machines_fail_and_each_round_ends_on_the_hashes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    rows = federation_faults(tmp_path)
    print(table(rows))
    assert [row.same for row in rows if row.same is not None] == [True] * 3
    assert len(rows) == (4 if shifted_clock() else 3)
    assert all(row.seen for row in rows)


def test_gate_passes_is_cut_and_passes_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gate = Gate(server.getsockname()[1])
        taken: list[socket.socket] = []
        accepted = threading.Semaphore(0)

        def accept() -> None:
            for _ in range(2):
                taken.append(server.accept()[0])
                accepted.release()

        threading.Thread(target=accept, daemon=True).start()
        try:
            with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as link:
                link.sendall(b"a")
                assert accepted.acquire(timeout=10) and taken[0].recv(1) == b"a"
                gate.cut()
                assert link.recv(1) == b"" and taken[0].recv(1) == b""
            with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as refused:
                assert refused.recv(1) == b""
            gate.mend()
            with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as link:
                assert accepted.acquire(timeout=10)
                taken[1].sendall(b"b")
                assert link.recv(1) == b"b"
        finally:
            for end in taken:
                end.close()
            gate.close()


def test_table_says_when_and_whether_the_hashes_are_the_same() -> None:
    rows = [
        Seen(fault="nothing", seen="*round*", after=0.0, then="goes on", same=True),
        Seen(fault="a fault", seen="*why*", after=12.4, then="ends", same=False),
    ]
    assert table(rows).splitlines()[2:] == [
        "| nothing | *round* |  | goes on | yes |",
        "| a fault | *why* | 12 s | ends | **no** |",
    ]
