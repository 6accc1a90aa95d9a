"""A run of the deployment guide's machines, and what is seen when one of Flower's fails."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.deployment.faults import MINUTES, Hashes, Say, Seen, app_of, undisturbed, words
from tests.deployment.federation import NAMES, SECONDS_REFUSED, Deployed, shifted_clock
from tests.deployment.machines import Process, wait

_ROUNDS = 3


def federation_faults(folder: Path, say: Say = print) -> list[Seen]:
    """Return what is seen of a SuperNode with a wrong clock, one that is killed, and a lost SuperLink."""
    app = app_of(folder, _ROUNDS, steps=12)
    expected = undisturbed(folder, app)
    hashes, rows = Hashes(folder / "run"), list[tuple[int, Seen]]()
    with Deployed(folder / "home", app) as machines, hashes.watched():
        rows += [(0, row) for row in _wrong_clock(machines)]
        for name in NAMES:
            machines.start_node(name)
        job = machines.submit(folder / "run")
        steps: list[Callable[[Deployed, Process], Seen]] = [_nothing, _node_killed, _link_killed]
        for number, step in enumerate(steps, start=1):
            say(f"round {number}: {step.__name__.strip('_')}")
            try:
                wait(partial(machines.in_round, number, 2), MINUTES, f"clients in round {number}")
                rows.append((number, step(machines, job)))
            except (TimeoutError, AssertionError):
                say(job.text[-6000:])
                raise
        resumed = machines.job("--resume", str(folder / "run"))
        assert resumed.wait(MINUTES) == 0, resumed.text[-4000:]
    return [
        replace(row, same=hashes.rounds.get(number) == expected[number] if number else None)
        for number, row in rows
    ]


def _wrong_clock(machines: Deployed) -> list[Seen]:
    """A SuperNode whose clock is two hours ahead; no row where this machine cannot shift one."""
    before = shifted_clock()
    if not before:
        return []
    started = time.monotonic()
    node = machines.start_node(NAMES[0], *before)
    assert node.wait(MINUTES) == 0, node.text
    found = node.said("terminated gracefully")
    assert found is not None, node.text
    return [
        Seen(
            fault="a SuperNode's clock two hours ahead",
            seen=f"its SuperNode says *{words(found)}* and ends",
            after=found[0] - started,
            then="waits for its clients",
        )
    ]


def _nothing(machines: Deployed, job: Process) -> Seen:
    found = job.wait_said("round 1/", MINUTES)
    return Seen(
        fault="nothing, with TLS everywhere and SuperNodes that prove their keys",
        seen=f"*{words(found)}*",
        after=0.0,
        then="",
    )


def _node_killed(machines: Deployed, job: Process) -> Seen:
    started = time.monotonic()
    machines.nodes[NAMES[1]].kill_machine()
    time.sleep(SECONDS_REFUSED)
    machines.start_node(NAMES[1])
    found = job.wait_said(r"waiting for partition 1 \(node|left the run", MINUTES, started)
    job.wait_said("connected again", MINUTES, started)
    return Seen(
        fault=f"a SuperNode killed, and started again after {SECONDS_REFUSED:.0f} s",
        seen=f"*{words(found)}*",
        after=found[0] - started,
        then="one attempt is lost; the round begins again when it is back",
    )


def _link_killed(machines: Deployed, job: Process) -> Seen:
    assert machines.superlink is not None
    started = time.monotonic()
    machines.superlink.kill_machine()
    machines.start_superlink()
    code = job.wait(MINUTES)
    assert code != 0, job.text[-4000:]
    found = job.said("flower-split: run|flower-split: lost contact", started)
    assert found is not None, job.text[-4000:]
    return Seen(
        fault="the SuperLink killed, and started again with its database",
        seen=f"`flower-split run` fails: *{words(found)}*",
        after=found[0] - started,
        then="has ended; `--resume` goes on from the committed round",
    )
