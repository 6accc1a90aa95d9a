"""Real rounds of 1 to 64 clients beside what ``flower_split.scale`` predicts of them.

Usage: ``python -m tests.support.scale_rig [apart|together] [N,N…]``; prints a table. Costs come from a
round of one client; everything else is predicted.

``apart``: a real trunk in a process of its own, real gRPC, and clients on machines of their own, which is
to say threads that sleep where such a client would compute or wait for its link. ``together``: an
in-process federation, where clients and trunk share one interpreter.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from flower_split.client.calls import WireStats
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.lora import adapter_state
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.values import RoundPlan
from flower_split.scale.costs import Costs
from flower_split.scale.round import Federation as SimulatedFederation
from flower_split.scale.setting import Link, Setting, Work
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_process import TrunkProcess
from tests.acceptance.federation import federation, make_batch, make_config, write_checkpoint

ROWS, POSITIONS, WIDTH = 4, 64, 32
STEPS = 6
OWN_SECONDS = 0.24  # of an absent client's computing, a micro-batch
LINK = Link(megabits=20.0, latency=0.03)
SHARES = (0.25, 0.5, 0.25)  # of it: before the forward, between, after the backward


@dataclass(frozen=True, slots=True)
class Measured:
    """A real round."""

    seconds: float  # from the first step's begin to the last one's end
    trunk_seconds: float  # of the trunk's computing
    wire: WireStats  # of one client


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


class Apart(AbstractContextManager["Apart"]):
    """A real trunk in a process of its own, and clients that are elsewhere."""

    def __init__(self, folder: Path) -> None:
        self._config = job(folder, 1)
        self._ending = ExitStack()
        trunk = self._ending.enter_context(closing(TrunkProcess.start(self._config, 300.0)))
        coordinator = TrunkCoordinator(trunk.address, trunk.token, timeout=60.0)
        self._trunk, self._coordinator = trunk, self._ending.enter_context(closing(coordinator))
        self._round = 0

    def __exit__(self, *exception: object) -> None:
        self._ending.close()

    def measure(self, clients: int) -> Measured:
        """Train a round of so many clients."""
        self._round += 1
        tokens = {slot: f"the-token-of-slot-{slot}-{self._round}" for slot in range(clients)}
        plan = RoundPlan(
            experiment="scale",
            server_round=self._round,
            attempt=0,
            participants=tokens,
            num_server_rounds=100,
            join_seconds=120.0,
            window_seconds=120.0,
        )
        self._coordinator.begin_round(plan)
        trunks = [_open(self._config, self._trunk.address, token) for token in tokens.values()]
        with ThreadPoolExecutor(clients) as pool:
            ends = list(pool.map(_absent_client, trunks, tokens))
        report = self._coordinator.prepare_round("scale", self._round, 0)
        self._coordinator.commit_round("scale", self._round, 0)
        seconds = max(end for _, end, _ in ends) - min(start for start, _, _ in ends)
        return Measured(seconds, report.compute_seconds, ends[0][2])


def _open(config: RunConfig, address: str, token: str) -> RemoteTrunk:
    trunk = RemoteTrunk(
        address,
        token=token,
        fingerprint=fingerprint(config),
        mode=config.mode,
        call_timeout=config.trunk.call_timeout,
    )
    trunk.open(STEPS)
    return trunk


def _absent_client(trunk: RemoteTrunk, slot: int) -> tuple[float, float, WireStats]:
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


def together(folder: Path, clients: int) -> Measured:
    """Train a round with clients of one interpreter."""
    config = job(folder, clients)
    batches = {
        slot: [make_batch(ROWS, [POSITIONS] * ROWS, seed=100 * slot + n) for n in range(STEPS)]
        for slot in range(clients)
    }
    with federation(config) as parties:
        for slot in batches:
            parties.client_model(slot)
        adapter = adapter_state(parties.client_model(0))
        start = time.monotonic()
        _, results, report = parties.train(adapter, batches, num_steps=STEPS)
        seconds = time.monotonic() - start
    steps = results[0].steps
    wire = WireStats(
        bytes_sent=results[0].bytes_sent,
        bytes_received=results[0].bytes_received,
        wire_seconds=sum(step.wire_seconds for step in steps),
        trunk_queue_seconds=sum(step.wait_seconds for step in steps),
        calls=2 * STEPS,
    )
    return Measured(seconds, report.compute_seconds, wire)


def costs_of(one: Measured, own_seconds: float) -> Costs:
    """The costs that a round of one client measured."""
    return Costs(
        client_seconds=own_seconds,
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


def compare(kind: str, counts: Sequence[int], folder: Path) -> dict[int, tuple[float, float]]:
    """Measure and predict rounds; by number of clients: seconds on paper, seconds of the real round."""
    with ExitStack() as ending:
        if kind == "apart":
            measure = ending.enter_context(Apart(folder)).measure
        else:
            measure = partial(together, folder)
        measure(1)  # libraries and files are in memory then
        one = measure(1)
        costs, setting = costs_of(one, OWN_SECONDS), Setting(clients=1, cohort=1, links=[LINK])
        if kind == "together":
            away = one.wire.wire_seconds + one.wire.trunk_queue_seconds + one.trunk_seconds
            costs = costs_of(one, (one.seconds - away) / STEPS)
            free = Link(megabits=float("inf"), latency=0.0)
            setting = replace(setting, links=[free], cores=1)  # of one interpreter
        print(costs, flush=True)
        found = {}
        for count in counts:
            said = predicted(
                job(folder, count), costs, replace(setting, clients=count, cohort=count)
            )
            real = measure(count).seconds
            found[count] = (said, real)
            print(
                f"{kind} {count:3d} clients: predicted {said:7.2f} s, measured {real:7.2f} s, "
                f"{100 * (said / real - 1):+.1f} %",
                flush=True,
            )
        return found


def main(arguments: Sequence[str]) -> None:
    kind = arguments[0] if arguments else "apart"
    counts = [int(n) for n in (arguments[1] if len(arguments) > 1 else "2,4,8,16,32,64").split(",")]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(kind, counts, Path(folder))
    errors = [abs(said / real - 1) for said, real in found.values()]
    print(
        f"largest error {100 * max(errors):.1f} %, median {100 * statistics.median(errors):.1f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
