"""What the trunk's checks cost a training step: measured inside them, and as a difference of steps.

Three clients train a trunk of Llama layers with LoRA over loopback gRPC, in one process. A step is every
client's forward and backward, and the optimizer step that they complete. The checks are admission (with
the proof that a token is its client's) and quotas, whose session a call is, the comparison of every call
with the model's schema, the looks for NaN, Inf and size, and the bounds on numbers and norms.

Inside: a clock is read where a check begins and ends, on whatever thread; one that another one calls is
counted with that. As a difference: steps with checks, without them, and with an audit log take turns, so
that what else the machine does falls on all; each is compared with the one without checks beside it.
The median of these ratios has a 95 % interval (by ranks, so that no spread is assumed). Where zero lies
in it, the machine's noise is more than the difference, and the first number is the one to read. It ends
with 1 if the time inside the checks is more than ``--at-most`` of a step::

    python simulations/trunk_checks.py --steps 20
"""

import argparse
import contextlib
import functools
import logging
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrunkConfig,
)
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.values import RoundPlan
from flower_split.runtime.logs import quiet_libraries
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.build import make_engine
from flower_split.trunk.compute import checks, compute
from flower_split.trunk.engine import contributions
from flower_split.trunk.service import admission, handlers
from flower_split.trunk.service.audit_log import AuditLog
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.possession import ClientKey, new_token

CLIENTS, HEADS = 3, 8
WARM = 2  # turns that are not counted
TOKEN = "of this process alone"
WITHOUT, WITH, AUDITED = "without checks", "with checks", "with checks and audit log"
# Where each check is called from, its name for the table, and what stands in its place without it.
CHECKS: tuple[tuple[object, str, str, Callable[..., object]], ...] = (
    (compute, "check_finite", "NaN and Inf", lambda *_: None),
    (compute, "check_all_finite", "NaN and Inf", lambda *_: None),
    (compute, "check_bounded", "size of gradients and weights", lambda *_: None),
    (
        checks.InputSchema,
        "forward",
        "schema, NaN and Inf of a forward",
        lambda self, call, *_, **__: call,
    ),
    (checks.InputSchema, "check_backward", "the same of a backward", lambda *_, **__: None),
    (contributions, "faults", "bounds on numbers and norms", lambda *_, **__: {}),
    (contributions, "outliers", "bounds on numbers and norms", lambda *_: {}),
    (
        admission.Admission,
        "intercept_service",
        "admission and proof",
        lambda self, go_on, details: go_on(details),
    ),
    (handlers.Quotas, "enter", "quotas", lambda *_: None),
    (handlers.Quotas, "leave", "quotas", lambda *_: None),
    (handlers.Holding, "announce", "quotas", lambda *_: None),
    (handlers.SessionTokens, "check", "whose session", lambda *_: None),
)

Given = ParamSpec("Given")
Result = TypeVar("Result")
Pair = tuple[float, float]  # seconds of the clock, and of the processor


@dataclass
class Inside:
    """Seconds inside the checks of the steps so far, of all threads."""

    seconds: dict[str, Pair] = field(default_factory=dict)  # by a check's name
    calls: int = 0

    def __post_init__(self) -> None:
        self._lock, self._thread = threading.Lock(), threading.local()

    def timed(self, name: str, check: Callable[Given, Result]) -> Callable[Given, Result]:
        """Return a check that notes its time, unless it is called by one that does."""

        @functools.wraps(check)
        def run(*given: Given.args, **named: Given.kwargs) -> Result:
            if getattr(self._thread, "busy", False):
                return check(*given, **named)
            self._thread.busy = True
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return check(*given, **named)
            finally:
                took = time.perf_counter() - began, time.thread_time() - cpu
                self._thread.busy = False
                with self._lock:
                    before = self.seconds.get(name, (0.0, 0.0))
                    self.seconds[name] = before[0] + took[0], before[1] + took[1]
                    self.calls += 1

        return run

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Note the time of all checks inside the block."""
        with contextlib.ExitStack() as stack:
            for owner, attribute, name, _ in CHECKS:
                timed = self.timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield


@dataclass
class Measured:
    """Seconds of every step, by variant, and those inside the checks of the steps that have them."""

    steps: dict[str, list[Pair]]
    inside: Inside


def main() -> int:
    """Print the tables; 1 if the checks take more than they may."""
    parser = argparse.ArgumentParser(prog="python simulations/trunk_checks.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--at-most", type=float, default=0.02, help="share of a step")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = write_model(Path(folder), arguments.hidden, arguments.layers)
        audit = AuditLog(Path(folder) / "audit.jsonl")
        shape = (arguments.rows, arguments.positions, arguments.hidden)
        measured = measure(config, audit, shape, arguments.steps)
    print(table(measured.steps), inside_table(measured), sep="\n\n")
    share = share_inside(measured)
    holds = max(share) <= arguments.at_most
    print(
        f"\nThe checks take {share[0]:.2%} of a step ({share[1]:.2%} of its processor time), and may take "
        f"{arguments.at_most:.0%}: {'held' if holds else 'NOT HELD'}."
    )
    return 0 if holds else 1


def write_model(folder: Path, hidden: int, layers: int) -> RunConfig:
    """Write a model whose trunk has so many layers, and return the run."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=layers + 2,
            num_attention_heads=HEADS,
            max_position_embeddings=4096,
        )
    ).save_pretrained(folder / "model")
    return RunConfig(
        model=ModelConfig(name=str(folder / "model"), first_cut=1, second_cut=layers + 1),
        lora=LoraConfigs(trunk=LoraPartConfig(r=16, alpha=32.0)),
        trunk=TrunkConfig(optimizer=OptimizerConfig(learning_rate=1e-4), transport="grpc"),
    )


def measure(
    config: RunConfig, audit: AuditLog, shape: tuple[int, int, int], steps: int
) -> Measured:
    """Take steps of all variants, in turns."""
    engine = make_engine(config)
    server = TrunkServer(engine, coordinator_token=TOKEN)
    address = f"127.0.0.1:{server.start()}"
    coordinator = TrunkCoordinator(address, TOKEN, timeout=60.0)
    measured = Measured({WITHOUT: [], WITH: [], AUDITED: []}, Inside())
    variants: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        WITHOUT: without_checks,
        WITH: measured.inside.looking,
        AUDITED: lambda: audited(server, audit),
    }
    windows = (steps + WARM) * len(variants)
    keys = {slot: ClientKey() for slot in range(CLIENTS)}
    tokens = {slot: new_token(key.public) for slot, key in keys.items()}
    plan = RoundPlan(experiment="checks", server_round=1, attempt=0, participants=tokens)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(server.stop, 0.0)
        stack.callback(coordinator.close)
        coordinator.begin_round(plan)
        clients = [
            stack.enter_context(
                RemoteTrunk(
                    address,
                    token=token,
                    key=keys[slot],
                    fingerprint=fingerprint(config),
                    mode="joint",
                    call_timeout=120.0,
                    transport="grpc",
                )
            )
            for slot, token in tokens.items()
        ]
        for client in clients:
            client.open(windows)
        window = 0
        for turn in range(steps + WARM):
            if turn == WARM:  # the first ones warm everything up
                measured.inside.seconds.clear()
                measured.inside.calls = 0
            names = list(variants)
            for name in names[turn % 3 :] + names[: turn % 3]:
                with variants[name]():
                    began, cpu = time.perf_counter(), time.process_time()
                    step(clients, window, shape)
                    took = time.perf_counter() - began, time.process_time() - cpu
                window += 1
                if turn >= WARM:
                    measured.steps[name].append(took)
    return measured


def step(clients: list[RemoteTrunk], window: int, shape: tuple[int, int, int]) -> None:
    """Take one step with every client's micro-batch; return when the weights have been stepped."""
    count = float(shape[0] * shape[1])
    for slot, client in enumerate(clients):
        generator = torch.Generator().manual_seed(slot)
        hidden = torch.randn(shape, generator=generator).requires_grad_()
        with client.micro_batch(window, 0, num_tokens=count, loss_denominator=count, last=True):
            output = client(hidden)
        (output.square().sum() / count).backward()
    clients[0].wait_version(window + 1)  # a backward is answered before the optimizer steps


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Leave the checks out inside the block."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, _, instead in CHECKS:
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        yield


@contextlib.contextmanager
def audited(server: TrunkServer, audit: AuditLog) -> Iterator[None]:
    """Note every call inside the block."""
    server.refusals.audit = audit
    try:
        yield
    finally:
        server.refusals.audit = None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the bounds of its 95 % interval, by ranks (Conover 1999, 3.2).

    Below six values no two ranks have that much between them: the bounds are infinite then.
    """
    ordered, count = sorted(values), len(values)
    tails = [sum(math.comb(count, k) for k in range(rank + 1)) / 2**count for rank in range(count)]
    below = sum(tail <= 0.025 for tail in tails)  # values to leave out on each side
    bounds = (ordered[below - 1], ordered[-below]) if below else (-math.inf, math.inf)
    return (statistics.median(values), *bounds)


def share_inside(measured: Measured) -> Pair:
    """Return the share of a step that is spent inside checks: of its seconds, of its processor time."""
    inside = measured.inside.seconds.values()
    steps = measured.steps[WITH]
    return (
        sum(pair[0] for pair in inside) / sum(pair[0] for pair in steps),
        sum(pair[1] for pair in inside) / sum(pair[1] for pair in steps),
    )


def table(steps: dict[str, list[Pair]]) -> str:
    """Return the medians, and those of the paired ratios with their intervals, as Markdown."""
    base = steps[WITHOUT]
    lines = [
        "| step | seconds | processor seconds | over without (95 % interval) | processor |",
        "|---|---|---|---|---|",
    ]
    for name, found in steps.items():
        wall, cpu = (statistics.median(pair[i] for pair in found) for i in (0, 1))
        if name == WITHOUT:
            lines.append(f"| {name} | {wall:.3f} | {cpu:.3f} | | |")
            continue
        more = [
            "{:+.1%} ({:+.1%} to {:+.1%})".format(
                *interval([mine[i] / other[i] - 1 for mine, other in zip(found, base, strict=True)])
            )
            for i in (0, 1)
        ]
        lines.append(f"| {name} | {wall:.3f} | {cpu:.3f} | {more[0]} | {more[1]} |")
    return "\n".join(lines)


def inside_table(measured: Measured) -> str:
    """Return what is spent inside each check, as Markdown."""
    steps = measured.steps[WITH]
    whole = [sum(pair[i] for pair in steps) for i in (0, 1)]
    lines = [
        f"| inside ({measured.inside.calls / len(steps):.0f} calls a step) | ms a step | processor ms "
        "| share of a step | of its processor time |",
        "|---|---|---|---|---|",
    ]
    ordered = sorted(measured.inside.seconds.items(), key=lambda item: -item[1][0])
    for name, (wall, cpu) in ordered:
        each = 1000 * wall / len(steps), 1000 * cpu / len(steps)
        shares = wall / whole[0], cpu / whole[1]
        lines.append(
            f"| {name} | {each[0]:.2f} | {each[1]:.2f} | {shares[0]:.2%} | {shares[1]:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
