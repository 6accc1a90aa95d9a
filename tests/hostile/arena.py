"""A trunk in a process of its own, an honest client and an attacker: what an attack costs the honest one.

A round trains with the honest client's gradient alone, whatever the attacker did: its weights have the
digest of a round that the attacker never joined. ``python -m tests.hostile.arena`` is the trunk.
"""

import logging
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import OptimizerConfig
from flower_split.errors import TrunkError
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.split import CutLayers, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.service.limits import Limits
from tests.hostile.attack import Attack, Attacker, AttackerApart, AttackerHere, Target, Told
from tests.support.loopback import COORDINATOR_TOKEN, served
from tests.support.tiny_models import tiny_model

ROWS, POSITIONS, HIDDEN = 4, 64, 256
FINGERPRINT = {"model": "arena"}
LIMITS = Limits(
    calls=16, call_bytes=16 << 20, call_positions=512, first_frame_seconds=3.0, connections=300
)
MAX_RATIO = 2.0
MAX_GROWTH = 64 << 20
_TURNS = 2  # of quiet and attack
_TRIES = 3  # of a step's time, on a machine that does other things


@dataclass(slots=True)
class Outcome:
    """What came of an attack."""

    attack: Attack
    answers: Counter[str] = field(default_factory=Counter)
    quiet_steps: list[float] = field(default_factory=list)  # seconds of honest steps
    attacked_steps: list[float] = field(default_factory=list)
    growth: int = 0  # bytes of the trunk's resident memory
    same_digest: bool = False
    problems: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # what an answer of each status said

    @property
    def quiet(self) -> float:
        """The median step before and after the attack."""
        return statistics.median(self.quiet_steps)

    @property
    def attacked(self) -> float:
        """The median step beside it."""
        return statistics.median(self.attacked_steps or [math.inf])

    @property
    def ratio(self) -> float:
        return self.attacked / self.quiet


def make_arena_engine() -> TrunkEngine:
    """Two llama layers of width 256, trained in full."""
    changes = {"hidden_size": HIDDEN, "intermediate_size": 512, "head_dim": 64}
    _, trunk = split_model(tiny_model("llama", **changes), CutLayers(1, 3))
    trunk.requires_grad_(True)
    return TrunkEngine(
        TrunkCompute(trunk, OptimizerConfig(name="sgd", learning_rate=0.01), seed=0),
        mode="joint",
        hidden_size=HIDDEN,
        fingerprint=FINGERPRINT,
        activation_bytes=48 << 20,
        cache_bytes=8 << 20,
    )


@contextmanager
def trunk_here() -> Iterator["Arena"]:
    """An arena whose trunk is in this process: its memory is not told from the attacker's."""
    engine = make_arena_engine()
    with served(engine, max_workers=64, limits=LIMITS, max_call_seconds=20.0) as port:
        yield Arena(port, os.getpid(), AttackerHere(), warm=1, steps=1)


@contextmanager
def trunk_apart() -> Iterator["Arena"]:
    """An arena whose trunk and attacker are processes of their own."""
    command = [sys.executable, "-m", "tests.hostile.arena"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    attacker = AttackerApart()
    try:
        yield Arena(int(process.stdout.readline()), process.pid, attacker)
    finally:
        attacker.close()
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class Arena:
    """One trunk, and rounds on it.

    Args:
        port: The trunk's.
        pid: Of its process.
        attacker: Makes the attacks.
        warm: Honest steps before a measurement.
        steps: Of each measurement.
    """

    def __init__(
        self, port: int, pid: int, attacker: Attacker, warm: int = 2, steps: int = 5
    ) -> None:
        self.port, self._attacker = port, attacker
        self._warm, self._steps = warm, steps
        self._statm = Path(f"/proc/{pid}/statm")
        self._rounds = 0
        self._digest = b""

    def resident(self) -> int:
        """Bytes of the trunk's process."""
        return int(self._statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(self, attack: Attack, tries: int = _TRIES) -> Outcome:
        """One round with an attack; a step's time over the bound is measured again."""
        if not self._digest:
            self._round(None)  # the first one warms everything up
            self._digest = self._round(None)[1]
        for _ in range(tries):
            outcome, digest = self._round(attack)
            outcome.same_digest = digest == self._digest
            if outcome.ratio <= MAX_RATIO:
                break
        return outcome

    def _round(self, attack: Attack | None) -> tuple[Outcome, bytes]:
        self._rounds += 1
        name, number = f"arena-{self._rounds}", self._rounds
        control = TrunkCoordinator(f"127.0.0.1:{self.port}", COORDINATOR_TOKEN, timeout=30.0)
        try:
            control.begin_round(
                RoundPlan(
                    experiment=name,
                    server_round=1,
                    attempt=0,
                    participants={0: f"honest-{number}", 1: f"attacker-{number}"},
                    step_every=StepEvery.SERVER_ROUND,
                    quorum=0.5,
                )
            )
            with RemoteTrunk(
                f"127.0.0.1:{self.port}",
                token=f"honest-{number}",
                fingerprint=FINGERPRINT,
                mode="joint",
                call_timeout=60.0,
                transport="grpc",
            ) as honest:
                grant = honest.open(1)
                outcome = self._fight(attack, honest, control, name, grant.session)
            report = control.prepare_round(name, 1, 0)
            left_out = {slot.slot: slot.problem for slot in report.slots if not slot.completed}
            if attack is not None and list(left_out) != [1]:
                outcome.problems.append(f"left out: {left_out}")
            if attack is not None and attack.named and "may be at most" not in left_out.get(1, ""):
                outcome.problems.append(f"the attacker is not named: {left_out}")
            control.abort_round(name, 1, 0, "the arena is done with it")
            return outcome, report.digest
        finally:
            control.close()

    def _fight(
        self,
        attack: Attack | None,
        honest: RemoteTrunk,
        control: TrunkCoordinator,
        name: str,
        session: str,
    ) -> Outcome:
        outcome = Outcome(attack or Attack("", "none", frozenset(), lambda enemy: None))
        work = _Work(honest, (2 * _TURNS + 1) * (self._warm + self._steps))
        if attack is not None:
            number = self._rounds
            tokens = f"attacker-{number}", f"attacker-{number - 1}"
            target = Target(self.port, *tokens, name, session, FINGERPRINT)
            self._attacker.join(target, attack.name)
            told = Told()
            try:
                self._measure(attack, work, outcome, control)
            except TrunkError as error:
                outcome.problems.append(f"the honest side failed: {error}")
            finally:
                told = self._attacker.end()
            outcome.answers, outcome.texts = Counter(told.answers), told.texts
            outcome.problems += told.problems
            work.steps(self._warm)
        outcome.quiet_steps += work.steps(work.left)
        return outcome

    def _measure(
        self, attack: Attack, work: "_Work", outcome: Outcome, control: TrunkCoordinator
    ) -> None:
        """Steps in quiet and under attack, in turns: this machine does other things too."""
        for _ in range(_TURNS if attack.repeats else 1):
            work.steps(self._warm)
            outcome.quiet_steps += work.steps(self._steps)
            before = self.resident()
            with _Peak(self.resident) as peak:
                self._attacker.begin()
                work.steps(self._warm)
                outcome.attacked_steps += work.steps(self._steps)
                control.status()
            outcome.growth = max(outcome.growth, peak.most - before)
            self._attacker.pause()

    def verdict(self, outcome: Outcome, *, timed: bool = True) -> list[str]:
        """Why an attack succeeded, in words; empty: it did not.

        Args:
            outcome: Of the attack.
            timed: Whether to look at seconds and memory.
        """
        found = list(outcome.problems)
        if not outcome.answers:
            found.append("the attack did not happen")
        for code in sorted(set(outcome.answers) - outcome.attack.codes):
            found.append(f"answered with {code}: {outcome.texts.get(code, '')[:200]}")
        if not outcome.same_digest:
            found.append("the weights differ")
        if timed and outcome.ratio > MAX_RATIO:
            found.append(f"a step takes {outcome.ratio:.1f} times as long")
        if timed and outcome.growth > MAX_GROWTH:
            found.append(f"memory grew by {outcome.growth >> 20} MiB")
        return found


class _Work:
    """The honest client's micro-batches, one after the other."""

    def __init__(self, trunk: RemoteTrunk, count: int) -> None:
        self._trunk, self._count, self._next = trunk, count, 0

    @property
    def left(self) -> int:
        return self._count - self._next

    def steps(self, steps: int) -> list[float]:
        """Make so many; return the seconds of each."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        index, tokens = self._next, ROWS * POSITIONS
        self._next += 1
        generator = torch.Generator().manual_seed(index)
        hidden = torch.randn(ROWS, POSITIONS, HIDDEN, generator=generator).requires_grad_()
        began = time.perf_counter()
        with self._trunk.micro_batch(
            0, index, num_tokens=tokens, loss_denominator=tokens, last=index == self._count - 1
        ):
            output = self._trunk(hidden)
        (output.sum() / tokens).backward()
        return time.perf_counter() - began


class _Peak:
    """The most of something inside a block, looked at fifty times a second."""

    def __init__(self, look: Callable[[], int]) -> None:
        self.most = look()
        self._look, self._stop = look, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, self._look())

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, self._look())


def main() -> None:
    """Be the trunk, until standard input ends."""
    torch.set_num_threads(1)
    logging.getLogger("flower_split").setLevel(logging.ERROR)
    engine = make_arena_engine()
    with served(engine, max_workers=64, limits=LIMITS, max_call_seconds=20.0) as port:
        print(port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
