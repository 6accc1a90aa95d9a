"""Kill a small federated run anywhere, hundreds of times, and compare its final weights.

    python simulations/chaos/run.py --faults 200 --seed 0

A real job (tiny Llama, four clients, AdamW, dropout, schedules, seeded sampling) runs once without
faults. Then it runs again and again under SIGKILLs of the trunk, the ServerApp's process and the
clients, at random times and at every named failpoint, while three in ten connections to the trunk
deliver every call twice (the trunk takes a signed number again here, or it would turn the second one away
unread); with ``--network`` connections are cut, refused and delayed too. Whoever dies
is started again, as a supervisor would; the ServerApp resumes its run directory. Every run must end on
the hash of the fault-free one. ``--no-dedupe`` switches the trunk's memory of calls off, and the same
command must then find differences.

The clients, the trunk and the ServerApp's code are the package's own, each in a process of its own and
talking gRPC; only the SuperLink and the SuperNodes are replaced, by a grid of processes on Unix sockets
(grid.py), because a real SuperLink's restarts would make hundreds of kills take hours.
Recovery is timed from a kill to the next commit of a round, process starts and the round itself included.
Exit status: 0 if every run ended on the expected hash, 1 otherwise.
"""

import argparse
import hashlib
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from processes import Job, Role
from proxy import Fault, Proxy
from safetensors.torch import load_file
from tiny import make_config

# Imported here, before anything is forked: every process has them at once.
import flower_split.client.handlers
import flower_split.server.app
import flower_split.trunk.build
import flower_split.trunk.service.server  # noqa: F401
from flower_split.config import Scalar
from flower_split.runtime import failpoints

_DUPLICATED = 0.3  # share of the connections to the trunk
_FEDBUFF: dict[str, Scalar] = {
    "fraction-train": 1.0,
    "trunk.step-every": "server-round",
    "strategy.name": "fedbuff",
    "strategy.buffer-size": 3,
    "strategy.max-staleness": 0,
}
_FAST: dict[str, Scalar] = {  # a process that starts has layers to compile
    "train.compute": "fast",
    "trunk.compute": "fast",
    "trunk.window-batches": "on",
    "join-timeout": 300.0,
    "round-timeout": 600.0,
    "trunk.join-timeout": 120.0,
    "trunk.window-timeout": 120.0,
    "trunk.call-timeout": 120.0,
}
_RUN_SECONDS = 240.0  # one run must end by then, whatever is done to it
_FAST_RUN_SECONDS = 600.0


@dataclass
class Outcome:
    """One run of the job."""

    seed: int
    digest: str
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    recovery: float = 0.0  # longest time from a kill to the next commit, in seconds
    problem: str = ""


def digest_of(run_dir: Path) -> str:
    """SHA-256 over the final adapters of clients and trunk."""
    sha = hashlib.sha256()
    for part in ("client", "trunk"):
        for name, tensor in sorted(load_file(run_dir / "adapters" / f"{part}.safetensors").items()):
            sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


class Chaos:
    """One run under faults.

    Args:
        job: What runs.
        chance: Decides everything that is random here.
        faults: How many faults to inject; 0: none.
        kinds: Of "random" (kills at random times), "failpoint" (kills at named places) and "network".
        places: Failpoints still to be fired, shared by all runs; the rarest come first.
        fast: Whether processes compile their layers, for longer than a ServerApp waits for a trunk.
    """

    def __init__(
        self,
        job: Job,
        chance: random.Random,
        faults: int,
        kinds: list[str],
        places: Counter[str],
        fast: bool,
    ) -> None:
        self.job = job
        self.chance = chance
        self.left = faults
        self.kinds = kinds
        self.places = places
        self.fast = fast
        self.seconds = _FAST_RUN_SECONDS if fast else _RUN_SECONDS
        self.outcome = Outcome(0, "", 0.0)
        self._killed: float | None = None  # when the last process died that no commit has followed
        self._committed = 0  # time stamp of the manifest

    def run(self) -> Outcome:
        """To the end of the job."""
        # Whatever else fails, many connections deliver every call twice.
        own = random.Random(self.chance.random())  # the proxy asks on its own thread
        duplicates = (lambda: own.random() < _DUPLICATED) if self.left > 0 else None
        proxy = Proxy(("127.0.0.1", self.job.trunk_port), duplicates)
        if not self.job.supervised:
            self.job.config["trunk.address"] = f"127.0.0.1:{proxy.port}"
        started = time.monotonic()
        next_fault = started + self.chance.expovariate(1.0)
        try:
            for role in self.job.roles:
                self._start(role)
                if role is self.job.trunk and self.fast:
                    self._wait_for_trunk()
            while not self._finished():
                now = time.monotonic()
                self._watch_commits(now)
                if now - started > self.seconds:
                    self.outcome.problem = f"not done after {self.seconds:g} s"
                    break
                self._start_again()
                if self.outcome.problem:
                    break
                if self.left > 0 and now >= next_fault:
                    self._inject(proxy)
                    pause = 8.0 if self.job.supervised else 0.1  # a real child starts slowly
                    next_fault = now + pause + self.chance.expovariate(1.2)
                time.sleep(0.02)
            self._recovered(time.monotonic())
        finally:
            for role in self.job.roles:
                if role.alive:
                    role.kill()
            proxy.close()
        for kind, count in proxy.fired.items():
            self.outcome.faults[f"network {kind}"] += count
        self.outcome.seconds = time.monotonic() - started
        if not self.outcome.problem:
            self.outcome.digest = digest_of(self.job.run_dir)
        return self.outcome

    def _watch_commits(self, now: float) -> None:
        manifest = self.job.run_dir / "checkpoints" / "MANIFEST"
        stamp = manifest.stat().st_mtime_ns if manifest.exists() else 0
        if stamp != self._committed:
            self._committed = stamp
            self._recovered(now)

    def _recovered(self, now: float) -> None:
        if self._killed is not None:
            self.outcome.recovery = max(self.outcome.recovery, now - self._killed)
            self._killed = None

    def _finished(self) -> bool:
        return self.job.server.exit_code == 0

    def _start(self, role: Role) -> None:
        """Start a process; where failpoints are asked for, with one that will kill it."""
        failpoint = ""
        if self.left > 0 and "failpoint" in self.kinds:
            rare = min(self.places[place] for place in role.places)
            place = self.chance.choice([p for p in role.places if self.places[p] == rare])
            failpoint = f"{place}=kill@{self.chance.randint(1, 3)}"
        role.start(failpoint)
        self.outcome.starts += 1

    def _start_again(self) -> None:
        for role in self.job.roles:
            if role.alive or role.exit_code == 0:
                continue
            if role.exit_code == -9:  # at its failpoint: nobody else kills behind this loop's back
                place = role.failpoint.partition("=")[0]
                self.places[place] += 1
                self._count(f"{role.name.partition('-')[0]} failpoint")
            elif role is self.job.server and self._found_no_trunk():
                self._wait_for_trunk()
            else:
                last = "\n".join(role.log.read_text(errors="replace").splitlines()[-40:])
                self.outcome.problem = (
                    f"{role.name} ended with {role.exit_code}; see {role.log}, which ends:\n{last}"
                )
                return
            self._start(role)

    def _found_no_trunk(self) -> bool:
        """Whether the ServerApp has ended because the trunk was still compiling."""
        lines = self.job.server.log.read_text(errors="replace").splitlines()
        return self.fast and "errors.TrunkUnavailable" in "".join(lines[-1:])

    def _wait_for_trunk(self) -> None:
        """Wait until the trunk listens, at most a quarter of the run's time; the ServerApp says if not."""
        deadline = time.monotonic() + self.seconds / 4
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.job.trunk_port), 1.0).close()
                return
            except OSError:
                time.sleep(0.2)

    def _inject(self, proxy: Proxy) -> None:
        kind = self.chance.choice([kind for kind in self.kinds if kind != "failpoint"] or [""])
        if kind == "network":
            kind = self.chance.choice(["cut", "cut", "cut", "cut", "refuse", "delay"])
            proxy.inject(
                Fault(kind, after_bytes=self.chance.randint(1, 20_000), seconds=0.3)
                if kind in ("cut", "delay")
                else Fault(kind)
            )
            self.left -= 1
            return
        if kind == "":
            return
        if self.job.supervised:
            # A trunk that is killed before the run has begun is an error, as it should be.
            begun = (self.job.run_dir / "checkpoints" / "MANIFEST").exists()
            if begun and self.job.kill_child_trunk():
                self._count("child trunk")
            return
        role = self.chance.choice(
            [self.job.trunk, self.job.server, self.chance.choice(self.job.clients)]
        )
        if role.alive:
            role.kill()
            self._count(f"{role.name.partition('-')[0]} random")
            self._start(role)

    def _count(self, what: str) -> None:
        self.outcome.faults[f"kill {what}"] += 1
        self._killed = time.monotonic()
        self.left -= 1


_TWICE = "network duplicate"


def _counted(done: Counter[str]) -> int:
    """Faults that count: duplicated connections come on top."""
    return sum(count for kind, count in done.items() if kind != _TWICE)


def main() -> int:
    """Run, print the table, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--faults", type=int, default=200, help="SIGKILLs to deliver, over all runs"
    )
    parser.add_argument("--faults-per-run", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--network", action="store_true", help="cut, refuse and delay connections too"
    )
    parser.add_argument("--no-kills", action="store_true", help="only the network fails")
    parser.add_argument("--no-dedupe", action="store_true", help="let the trunk forget its calls")
    parser.add_argument(
        "--supervised", action="store_true", help="kill the trunk that the ServerApp looks after"
    )
    parser.add_argument(
        "--fedbuff",
        action="store_true",
        help="rounds are buffers of arrivals, of which none is late, so that runs are repeatable",
    )
    parser.add_argument(
        "--fast",
        metavar="DEVICE",
        default="",
        help="clients and trunk compute as train.compute = fast does, on cpu or cuda",
    )
    parser.add_argument("--keep", type=Path, help="where the runs' directories stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = ["network"] * (arguments.network or arguments.no_kills)
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    config: dict[str, Scalar] = make_config(root / "job", arguments.clients, arguments.rounds)
    if arguments.fedbuff:
        config |= _FEDBUFF
    fast = bool(arguments.fast)
    if fast:
        config |= _FAST | {"train.device": arguments.fast, "trunk.device": arguments.fast}
    places: Counter[str] = Counter()
    reference = Job(root / "reference", config)
    expected = Chaos(reference, random.Random(0), 0, [], places, fast).run()
    if expected.problem:
        print(f"the fault-free run failed: {expected.problem}", file=sys.stderr)
        return 1
    print(f"fault-free: {expected.digest[:16]}  {expected.seconds:.1f} s", flush=True)
    outcomes: list[Outcome] = []
    done: Counter[str] = Counter()
    while _counted(done) < arguments.faults:
        seed = arguments.seed * 10_000 + len(outcomes)
        left = min(arguments.faults_per_run, arguments.faults - _counted(done))
        # By turns: kills at random times, kills at named places.
        turn = 0 if arguments.supervised else len(outcomes) % 2
        kills = [] if arguments.no_kills else [["random"], ["failpoint"]][turn]
        kinds = kills + network
        job = Job(
            root / f"run-{seed}",
            config,
            dedupe=not arguments.no_dedupe,
            supervised=arguments.supervised,
        )
        outcome = Chaos(job, random.Random(seed), left, kinds, places, fast).run()
        outcome.seed = seed
        outcomes.append(outcome)
        done += outcome.faults
        same = "same" if outcome.digest == expected.digest else "DIFFERENT"
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items()))
        print(
            f"run {seed}: {outcome.digest[:16] or '-':16}  {same:9}  {outcome.seconds:5.1f} s  "
            f"recovery {outcome.recovery:4.1f} s  {outcome.starts} starts  "
            f"{faults or 'no fault'}  {outcome.problem}",
            flush=True,
        )
        if outcome.problem and not arguments.no_dedupe:
            break
        if not outcome.faults and len(outcomes) > 5 + arguments.faults:
            break
    wrong = [outcome for outcome in outcomes if outcome.digest != expected.digest]
    print("\nfault                      count")
    for kind, count in sorted(done.items()):
        print(f"{kind:26} {count:5}")
    for place in failpoints.PLACES:
        print(f"  killed at {place:32} {places[place]:3}")
    print(
        f"\n{_counted(done)} faults and {done[_TWICE]} duplicated connections in {len(outcomes)} "
        f"runs: {len(outcomes) - len(wrong)} on the "
        f"expected hash, {len(wrong)} not"
    )
    slowest = max((outcome.recovery for outcome in outcomes), default=0.0)
    print(f"slowest recovery, from the last kill to the next committed round: {slowest:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
