"""A run whose rounds each meet a fault of the trunk or of the way to it, and what is seen of it.

The ServerApp and its clients run without a SuperLink (``--local``), the trunk is a process of its own.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.deployment.machines import Machines, Process, wait
from tests.support.flower_home import Flower
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

MINUTES = 900.0  # for anything, on a busy machine
_SLOW_SECONDS = 15.0  # that a client runs a tenth of the time
_CUT_SECONDS = 12.0

Say = Callable[[str], None]
Fault = Callable[[Machines, Process], "list[Seen]"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One row of the table."""

    fault: str
    seen: str  # what the operator sees
    after: float  # seconds from the fault until then
    then: str  # what happens to the run
    same: bool | None = None  # whether the round's hashes are those of a run without faults


class Hashes:
    """The hashes of every round that a run commits, read while it goes on."""

    def __init__(self, run: Path) -> None:
        self.rounds: dict[int, tuple[str, str]] = {}  # client adapter with strategy, and trunk
        self._manifest = run / "checkpoints" / "MANIFEST"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look until the block ends, and once more."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._look()

    def _look(self) -> None:
        with suppress(OSError, json.JSONDecodeError):
            for entry in json.loads(self._manifest.read_text())["rounds"]:
                self.rounds[entry["server_round"]] = entry["file_sha256"], entry["trunk_digest"]


def trunk_faults(folder: Path, say: Say = print) -> list[Seen]:
    """Return what is seen of a trunk that is busy, other, slowly called, cut off, killed, or full."""
    faults = [_beside_another_run, _slow_client, _cut_link, _trunk_killed, _disk_full]
    app = app_of(folder, len(faults), steps=12)
    expected = undisturbed(folder, app)
    hashes, rows = Hashes(folder / "run"), []
    with Machines(folder / "home", app) as machines, hashes.watched():
        rows = [(0, _other_weights(machines, folder))]
        job = machines.submit(folder / "run")
        rows += _each_round(machines, job, faults, say)
        assert job.wait(MINUTES) != 0, job.text[-4000:]  # the disk was full
        resumed = machines.job("--resume", str(folder / "run"))
        assert resumed.wait(MINUTES) == 0, resumed.text[-4000:]
    return _compared(rows, hashes.rounds, expected)


def _each_round(
    machines: Machines, job: Process, faults: Sequence[Fault], say: Say
) -> list[tuple[int, Seen]]:
    """Return the rows of all faults, one fault in each round from 1, with the round's number."""
    rows = []
    for number, fault in enumerate(faults, start=1):
        say(f"round {number}: {fault.__name__.strip('_')}")
        try:
            wait(partial(machines.in_round, number), MINUTES, f"round {number}")
            rows += [(number, row) for row in fault(machines, job)]
        except (TimeoutError, AssertionError):
            say(job.text[-6000:])
            raise
    return rows


def _compared(
    rows: Sequence[tuple[int, Seen]],
    found: dict[int, tuple[str, str]],
    expected: dict[int, tuple[str, str]],
) -> list[Seen]:
    return [
        replace(row, same=found.get(number) == expected[number] if number else None)
        for number, row in rows
    ]


def app_of(folder: Path, rounds: int, steps: int) -> Path:
    config = tiny_config(
        make_model(folder / "model"),
        make_data(folder / "data", 2),
        num_server_rounds=rounds,
        fraction_evaluate=0.0,
        train__local_steps=steps,
        train__optimizer__name="adamw",
        train__optimizer__learning_rate=0.01,
        join_timeout=MINUTES,
        trunk__join_timeout=MINUTES,
        trunk__window_timeout=MINUTES,
        trunk__call_timeout=MINUTES,
        trunk__transport="grpc",
        round_retries=3,
        report="",
    )
    return make_app(folder / "app", config)


def undisturbed(folder: Path, app: Path) -> dict[int, tuple[str, str]]:
    """Run the app without faults, and return its hashes."""
    home = folder / "alone"
    home.mkdir()
    hashes = Hashes(folder / "expected")
    with hashes.watched():
        done = Flower(home, {**os.environ, "FLWR_HOME": str(home)}).command(
            *("flower-split", "run", str(app), "--local", "--run-config"),
            f"run-dir={json.dumps(str(folder / 'expected'))}",
            timeout=MINUTES,
        )
    assert done.returncode == 0, done.stdout
    return hashes.rounds


def _other_weights(machines: Machines, folder: Path) -> Seen:
    """A run whose clients hold another model of the same shape than the trunk."""
    other = make_model(folder / "other") / "model.safetensors"
    weights = load_file(other)
    save_file({name: 1.01 * value for name, value in weights.items()}, other, {"format": "pt"})
    started = time.monotonic()
    job = machines.submit(
        machines.home / "refused-model", config=f"model.name={json.dumps(str(other.parent))}"
    )
    assert job.wait(MINUTES) != 0, job.text
    found = job.said("do not hold parts of the same model")
    assert found is not None, job.text
    return Seen(
        fault="a run with other weights than the trunk's",
        seen=f"`flower-split run` fails: *{words(found)}*",
        after=found[0] - started,
        then="has not begun",
    )


def _beside_another_run(machines: Machines, job: Process) -> list[Seen]:
    wait(lambda: machines.in_round(1, joined=2), MINUTES, "both clients in round 1")
    held = job.clients()[-1]  # so that the round does not end before the others are refused
    os.kill(held, signal.SIGSTOP)
    rows = [
        Seen(fault="nothing", seen=f"*{words(job.wait_said('round 1/', 60))}*", after=0, then="")
    ]
    try:
        started = time.monotonic()
        others = [
            (machines.submit(machines.home / f"refused-{config}", config=config), name, pattern)
            for name, config, pattern in (
                ("a second run on the busy trunk", "", "is at work on"),
                ("a run with another seed than the trunk's", "seed=3", "would not do what this"),
            )
        ]
        for other, name, pattern in others:
            assert other.wait(MINUTES) != 0, other.text
            found = other.said(pattern)
            assert found is not None, other.text
            seen = f"`flower-split run` fails: *{words(found)}*"
            rows.append(
                Seen(fault=name, seen=seen, after=found[0] - started, then="the first goes on")
            )
    finally:
        os.kill(held, signal.SIGCONT)
    return rows


def _slow_client(machines: Machines, job: Process) -> list[Seen]:
    wait(lambda: machines.in_round(2, joined=2), MINUTES, "both clients in round 2")
    slow, started = job.clients()[-1], time.monotonic()
    while time.monotonic() - started < _SLOW_SECONDS:
        for kind, seconds in ((signal.SIGSTOP, 1.8), (signal.SIGCONT, 0.2)):
            os.kill(slow, kind)
            time.sleep(seconds)
    os.kill(slow, signal.SIGSTOP)
    found = job.wait_said("round 2/.*waiting for client", MINUTES, started)
    os.kill(slow, signal.SIGCONT)
    return [
        Seen(
            fault="a client ten times slower, and then not answering",
            seen=f"*{words(found)}*",
            after=found[0] - started,
            then="waits for it",
        )
    ]


def _cut_link(machines: Machines, job: Process) -> list[Seen]:
    wait(lambda: machines.in_round(3, joined=2), MINUTES, "both clients in round 3")
    started = time.monotonic()
    machines.gate.cut()
    time.sleep(_CUT_SECONDS)
    machines.gate.mend()
    found = job.wait_said("does not report its status", MINUTES, started)
    return [
        Seen(
            fault=f"the link to the trunk cut for {_CUT_SECONDS:.0f} s",
            seen=f"*{words(found)}*",
            after=found[0] - started,
            then="calls are repeated; the round goes on",
        )
    ]


def _trunk_killed(machines: Machines, job: Process) -> list[Seen]:
    wait(lambda: machines.in_round(4, joined=2), MINUTES, "both clients in round 4")
    assert machines.trunk is not None
    started = time.monotonic()
    machines.trunk.kill_machine()
    # The disk will be full when this one writes its second round: 4 again, then 5.
    machines.start_trunk("trunk.prepare.tensors-written=enospc@2")
    found = job.wait_said("does not report its status|the trunk restarted", MINUTES, started)
    return [
        Seen(
            fault="the trunk killed, and started again by its service manager",
            seen=f"*{words(found)}*",
            after=found[0] - started,
            then="the round begins again",
        )
    ]


def _disk_full(machines: Machines, job: Process) -> list[Seen]:
    found = job.wait_said("checkpoint cannot be written", MINUTES)
    return [
        Seen(
            fault="the disk full as the trunk writes a checkpoint",
            seen=f"*{words(found)}*",
            after=0.0,
            then="has ended; with space, `--resume` goes on from the committed round",
        )
    ]


def words(found: tuple[float, str]) -> str:
    """Return a log line without its beginning, shortened."""
    line = found[1]
    for level in ("INFO", "WARNING", "ERROR"):
        line = line.split(f"{level} ", 1)[-1]
    text = line.split(": ", 1)[-1] if line.startswith("[") else line
    text = text.removeprefix("flower-split").strip(" :").replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "…"
