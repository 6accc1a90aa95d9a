"""Real rounds of 1 to 64 clients beside what ``flower_split.scale`` predicts of them.

Usage: ``python -m tests.support.scale_rig [N,N…]``; prints a table. Costs come from rounds of one client;
everything else is predicted.

The trunk's own engine and service, real gRPC, and machines of their own, which is to say that clients sleep
where they would compute or wait for their link, and the trunk where its accelerator would compute.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.scale.costs import Costs
from flower_split.scale.round import Federation as SimulatedFederation
from flower_split.scale.setting import Link, Setting, Work
from flower_split.training.trunk_protocol import CallStats
from tests.acceptance.federation import federation, make_config, write_checkpoint

ROWS, POSITIONS, WIDTH = 2, 16, 32
STEPS = 3
OWN_SECONDS = 2.4  # of an absent client's computing, a micro-batch
TRUNK_SECONDS = 0.3  # of the trunk's, beside what the tiny model takes
LINK = Link(megabits=1.0, latency=0.03)
SHARES = (0.25, 0.5, 0.25)  # of it: before the forward, between, after the backward


@dataclass(frozen=True, slots=True)
class Measured:
    """A real round."""

    seconds: float  # from the first step's begin to the last one's end
    trunk_seconds: float  # of the trunk's computing
    wire: CallStats  # of one client


def job(folder: Path, clients: int, **trunk: object) -> RunConfig:
    """The job of a tiny Llama for so many clients."""
    path = folder / "model"
    if not path.exists():
        write_checkpoint(path)
    config = make_config(path, local_steps=STEPS, batch_size=ROWS, sequence_length=POSITIONS)
    limits = {"join_timeout": 120.0, "window_timeout": 120.0, "call_timeout": 150.0}
    return replace(
        config,
        num_clients=clients,
        trunk=replace(config.trunk, transport="grpc", **limits, **trunk),
    )


class Machines(AbstractContextManager["Machines"]):
    """A real trunk, whose accelerator is sleep, and clients that are elsewhere."""

    def __init__(self, folder: Path) -> None:
        self._ending = ExitStack()
        self._parties = self._ending.enter_context(federation(job(folder, 1)))
        compute = self._parties.engine.compute
        for name in ("forward_train", "backward"):
            vars(compute)[name] = _slow(getattr(compute, name))
        self._round = 0

    def __exit__(self, *exception: object) -> None:
        self._ending.close()

    def measure(self, clients: int) -> Measured:
        """Train a round of so many clients."""
        self._round += 1
        parties, limits = self._parties, {"join_seconds": 120.0, "window_seconds": 120.0}
        parties.begin(range(clients), self._round, num_server_rounds=100, **limits)
        trunks = [parties.remote(slot) for slot in range(clients)]
        for trunk in trunks:
            trunk.open(STEPS)
        with ThreadPoolExecutor(clients) as pool:
            ends = list(pool.map(_absent_client, trunks, range(clients)))
        report = parties.coordinator.prepare_round("test", self._round, 0)
        parties.coordinator.commit_round("test", self._round, 0)
        seconds = max(end for _, end, _ in ends) - min(start for start, _, _ in ends)
        return Measured(seconds, report.compute_seconds, ends[0][2])


def _slow(run: Callable[..., object]) -> Callable[..., object]:
    """A computation that takes as long as on a slower machine."""

    def slow(*arguments: object, **named: object) -> object:
        time.sleep(TRUNK_SECONDS / 2)
        return run(*arguments, **named)

    return slow


def _absent_client(trunk: RemoteTrunk, slot: int) -> tuple[float, float, CallStats]:
    """Train as a client does whose computing and whose link are sleep."""
    generator = torch.Generator().manual_seed(slot)
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.int64)
    way = LINK.seconds(4 * ROWS * POSITIONS * WIDTH)
    before, between, after = (share * OWN_SECONDS for share in SHARES)
    trunk.take_stats()
    start = time.monotonic()
    for step in range(STEPS):
        hidden = torch.randn(ROWS, POSITIONS, WIDTH, generator=generator).requires_grad_()
        tokens = ROWS * (POSITIONS - 1)
        with trunk.micro_batch(step, 0, num_tokens=tokens, loss_denominator=tokens, last=True):
            time.sleep(before + way)
            output = trunk(hidden, attention_mask=mask)
            time.sleep(way + between + way)
            torch.autograd.grad(output.square().mean(), [hidden, trunk.always], allow_unused=True)
            time.sleep(way + after)
    end = time.monotonic()
    stats = trunk.take_stats()
    trunk.close()
    return start, end, stats


def costs_of(one: Measured) -> Costs:
    """The costs that a round of one client measured."""
    return Costs(
        client_seconds=OWN_SECONDS,
        trunk_seconds=one.trunk_seconds / STEPS,
        sent_bytes=one.wire.bytes_sent / STEPS,
        received_bytes=one.wire.bytes_received / STEPS,
        call_seconds=one.wire.wire_seconds / one.wire.calls / 2,
        handling_seconds=one.wire.wire_seconds / one.wire.calls / 2,
        step_seconds=one.wire.trunk_queue_seconds / STEPS,
    )


def predicted(config: RunConfig, costs: Costs, setting: Setting) -> float:
    """The seconds of a round on paper."""
    work = Work.of(config, steps=STEPS, eval_batches=0, ends_together=False)
    return SimulatedFederation(work, costs, setting).train().seconds


def compare(counts: Sequence[int], folder: Path) -> dict[int, tuple[float, float]]:
    """Measure and predict rounds; by number of clients: seconds on paper, seconds of the real round."""
    with Machines(folder) as machines:
        machines.measure(1)  # libraries and files are in memory then
        before, found = machines.measure(1), {}
        for count in counts:
            real = machines.measure(count).seconds
            after = machines.measure(1)  # a machine with other work changes its pace meanwhile
            setting = Setting(clients=count, cohort=count, links=[LINK])
            said = statistics.fmean(
                predicted(job(folder, count), costs_of(one), setting) for one in (before, after)
            )
            before = after
            found[count] = (said, real)
            print(
                f"{count:3d} clients: predicted {said:7.2f} s, measured {real:7.2f} s, "
                f"{100 * (said / real - 1):+.1f} %",
                flush=True,
            )
        print(costs_of(before))
        return found


def main(arguments: Sequence[str]) -> None:
    counts = [int(n) for n in (arguments[0] if arguments else "2,4,8,16,32,64").split(",")]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(counts, Path(folder))
    errors = [abs(said / real - 1) for said, real in found.values()]
    print(
        f"largest error {100 * max(errors):.1f} %, median {100 * statistics.median(errors):.1f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
