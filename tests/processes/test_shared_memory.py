"""Clients and trunks that are killed while they share memory: nothing of it is left."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from flower_split.errors import TrunkUnavailable
from flower_split.runtime import failpoints
from flower_split.trunk.service.server import TrunkServer
from tests.support.loopback import (
    COORDINATOR_TOKEN,
    HIDDEN,
    TinyTrunk,
    coordinator,
    make_engine,
    plan,
    remote,
)
from tests.support.ready_processes import READY

SECONDS = 240.0  # for a process to start or end on a busy machine
STEPS = ("open", "forward", "backward")


def serve(ours: Connection, places: str) -> None:
    """A trunk with one round begun, until it is killed or the pipe closes."""
    torch.set_num_threads(1)
    failpoints.switch_on_from(places)
    engine = make_engine(TinyTrunk())
    with TrunkServer(engine, coordinator_token=COORDINATOR_TOKEN) as server:
        engine.begin_round(plan(join_seconds=SECONDS, window_seconds=SECONDS))
        ours.send(server.start())
        ours.poll(None)
    engine.close()


def work(ours: Connection, port: int, token: str) -> None:
    """A client that says what it has done, and goes on when it is told to."""
    torch.set_num_threads(1)
    trunk = remote(port, token=token, transport="shared-memory", call_timeout=SECONDS)
    trunk.open(2)
    ours.send("open")
    ours.recv()
    hidden = torch.ones(2, 500, HIDDEN, requires_grad=True)
    with trunk.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
        output = trunk(hidden)
    ours.send("forward")
    ours.recv()
    output.sum().backward()
    ours.send("backward")
    ours.recv()


@contextmanager
def process(target: object, *arguments: object) -> Iterator[tuple[int, Connection]]:
    """A process and the pipe to it; it is killed at the end."""
    ours, theirs = READY.Pipe()
    started = READY.Process(target=target, args=(theirs, *arguments), daemon=True)
    started.start()
    theirs.close()
    try:
        yield started.pid, ours
    finally:
        started.kill()
        started.join(SECONDS)
        assert started.exitcode is not None


def answer(pipe: Connection) -> object:
    assert pipe.poll(SECONDS), "the other process did not answer"
    return pipe.recv()


def held(pid: int) -> int:
    """How many mappings and open files of shared memory a process has.

    A mapping comes with an open file of its own; the trunk has one more, which clients open.
    """
    maps = Path(f"/proc/{pid}/maps").read_text()
    count = sum("/memfd:flower-split" in line for line in maps.splitlines())
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.is_symlink() and "memfd:flower-split" in os.readlink(link):
            count += 1
    return count


def kill_client_after(step: str) -> None:
    files = shared_files()
    with process(serve, "") as (trunk, ready):
        port = answer(ready)
        with process(work, port, "token-0") as (client, pipe):
            for done in STEPS:
                assert answer(pipe) == done
                if done == step:
                    break
                pipe.send("go on")
            shared = step != "open"
            assert (held(client), held(trunk)) == ((2, 3) if shared else (0, 0))
            os.kill(client, signal.SIGKILL)
        # Another attempt of the round: the token is no longer known, and the next client asks.
        with coordinator(port, timeout=SECONDS) as control:
            control.begin_round(plan(attempt=1, participants={0: "token-1"}, join_seconds=SECONDS))
        with remote(
            port, token="token-1", transport="shared-memory", call_timeout=SECONDS
        ) as again:
            again.open(1)
            with again.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
                again(torch.ones(1, 9, HIDDEN)).sum().backward()
            assert held(trunk) == 3  # the memory of the client that is here, and no other
        gc.collect()
        assert held(os.getpid()) == 0
    assert shared_files() <= files


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_client_killed_at_any_step_leaves_nothing(step: str) -> None:
    kill_client_after(step)


def shared_files() -> set[Path]:
    """The files of all processes; directories there are other tests' own."""
    return {path for path in Path("/dev/shm").iterdir() if path.is_file()}


def kill_trunk_at(place: str) -> None:
    files = shared_files()
    with process(serve, f"{place}=kill") as (_, ready):
        port = answer(ready)
        trunk = remote(port, transport="shared-memory", call_timeout=6.0)
        trunk.open(2)
        hidden = torch.ones(2, 500, HIDDEN, requires_grad=True)
        with pytest.raises(TrunkUnavailable):
            with trunk.micro_batch(0, 0, num_tokens=5, loss_denominator=5.0, last=True):
                output = trunk(hidden)
            output.sum().backward()
        assert held(os.getpid()) == 2
        trunk.close()
    del trunk, hidden
    output = None
    gc.collect()
    assert held(os.getpid()) == 0
    assert shared_files() <= files


def test_a_trunk_killed_in_a_backward_leaves_nothing() -> None:
    kill_trunk_at("trunk.backward.accumulated")


@pytest.mark.slow
def test_a_trunk_killed_in_a_forward_leaves_nothing() -> None:
    kill_trunk_at("trunk.forward.computed")
