"""What the trunk's checks cost a training step: with them, without them, and with an audit log.

Three clients train a trunk of Llama layers with LoRA over loopback gRPC, in one process. A step is every
client's forward and backward, and the optimizer step that they complete. The variants take turns, so
that what else the machine does falls on all; printed are medians over the steps, and of each step over
the one without checks beside it, in seconds of the clock and of the processor. "Without" leaves out
admission (with the proof that a token is its client's) and quotas, the comparison of every call with the
model's schema, the looks for NaN, Inf and size, and the bounds on numbers and norms::

    python simulations/trunk_checks.py --steps 20
"""

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from flower_split.trunk.engine import settling
from flower_split.trunk.service import admission, handlers
from flower_split.trunk.service.audit_log import AuditLog
from flower_split.trunk.service.server import TrunkServer
from flower_split.wire.possession import ClientKey, new_token

CLIENTS, HEADS = 3, 8
TOKEN = "of this process alone"
OFF: tuple[tuple[object, str, Callable[..., object]], ...] = (
    (compute, "check_finite", lambda *_: None),
    (compute, "check_all_finite", lambda *_: None),
    (compute, "check_bounded", lambda *_: None),
    (checks, "check_finite", lambda *_: None),
    (checks.InputSchema, "checked", lambda self, tensors, *_: dict(tensors)),
    (checks.InputSchema, "check_backward", lambda *_: None),
    (settling, "faults", lambda *_, **__: {}),
    (settling, "outliers", lambda *_: {}),
    (admission.Admission, "intercept_service", lambda self, go_on, details: go_on(details)),
    (handlers.Quotas, "enter", lambda *_: None),
    (handlers.Quotas, "leave", lambda *_: None),
    (handlers.Holding, "announce", lambda *_: None),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python simulations/trunk_checks.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=128)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = write_model(Path(folder), arguments.hidden, arguments.layers)
        audit = AuditLog(Path(folder) / "audit.jsonl")
        shape = (arguments.rows, arguments.positions, arguments.hidden)
        print(table(measure(config, audit, shape, arguments.steps)))


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
) -> dict[str, list[tuple[float, float]]]:
    """Return wall and processor seconds of every step, by variant, in turns."""
    engine = make_engine(config)
    server = TrunkServer(engine, coordinator_token=TOKEN)
    address = f"127.0.0.1:{server.start()}"
    coordinator = TrunkCoordinator(address, TOKEN, timeout=60.0)
    variants: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "without checks": without_checks,
        "with checks": contextlib.nullcontext,
        "with checks and audit log": lambda: audited(server, audit),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    windows = (steps + 2) * len(variants)
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
        for turn in range(steps + 2):
            names = list(variants)
            for name in names[turn % 3 :] + names[: turn % 3]:
                with variants[name]():
                    began, cpu = time.perf_counter(), time.process_time()
                    step(clients, window, shape)
                    took = time.perf_counter() - began, time.process_time() - cpu
                window += 1
                if turn >= 2:  # the first ones warm everything up
                    seconds[name].append(took)
    return seconds


def step(clients: list[RemoteTrunk], window: int, shape: tuple[int, int, int]) -> None:
    """Take one step with every client's micro-batch."""
    count = float(shape[0] * shape[1])
    for slot, client in enumerate(clients):
        generator = torch.Generator().manual_seed(slot)
        hidden = torch.randn(shape, generator=generator).requires_grad_()
        with client.micro_batch(window, 0, num_tokens=count, loss_denominator=count, last=True):
            output = client(hidden)
        (output.square().sum() / count).backward()


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Leave the checks out inside the block."""
    with contextlib.ExitStack() as stack:
        for owner, name, instead in OFF:
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


@contextlib.contextmanager
def audited(server: TrunkServer, audit: AuditLog) -> Iterator[None]:
    """Note every call inside the block."""
    server.refusals.audit = audit
    try:
        yield
    finally:
        server.refusals.audit = None


def table(seconds: dict[str, list[tuple[float, float]]]) -> str:
    """Return the medians, and those of the paired ratios, as Markdown."""
    base = seconds["without checks"]
    lines = [
        "| step | seconds | processor seconds | over without | processor |",
        "|---|---|---|---|---|",
    ]
    for name, found in seconds.items():
        wall, cpu = (statistics.median(pair[i] for pair in found) for i in (0, 1))
        more = [
            statistics.median(mine[i] / other[i] for mine, other in zip(found, base, strict=True))
            - 1
            for i in (0, 1)
        ]
        lines.append(f"| {name} | {wall:.3f} | {cpu:.3f} | {more[0]:+.1%} | {more[1]:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
