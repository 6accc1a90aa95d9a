"""Several experiments on one trunk: memory and tokens a second, beside one experiment on the same trunk.

The trunk is a process of its own. The clients, in this process, send hidden states and gradients of random
numbers over gRPC and compute nothing. One experiment has as many clients as all experiments together have
otherwise, so that the same number of calls waits for the trunk, and both take turns on one trunk process.
"""

import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.presets import ALPHA, PRESETS, RANK, write_checkpoint
from flower_split.bench.step_parties import Answer, Worker
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.parties.experiment_settings import brought
from flower_split.parties.fingerprint import fingerprint
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.serve import RunningTrunk, Serving

_MIB = 2**20
_SECONDS = 600.0  # for a call, or a trunk to load


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentsBench:
    """What is measured."""

    preset: str = "tiny"
    device: str = "cpu"
    experiments: int = 8
    micro_batches: int = 8  # of each client in a round
    repeats: int = 5  # rounds that count
    num_threads: int = 1


@dataclass(frozen=True, slots=True)
class _Client:
    """A client of one round."""

    token: str
    config: RunConfig


def measure_experiments(bench: ExperimentsBench) -> Figures:
    """Measure one experiment and all of them in turns, and the trunk's memory."""
    preset = PRESETS[bench.preset]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder)
        write_checkpoint(preset, path / "model", bench.device)
        configs = [_config(bench, path / "model", seed) for seed in range(bench.experiments)]
        token = secrets.token_urlsafe(32)
        trunk = stack.enter_context(
            closing(Worker(serve, (configs[0], token, str(path)), bench.num_threads))
        )
        address = f"127.0.0.1:{trunk.answer().beside['port']:.0f}"
        links = [
            stack.enter_context(closing(TrunkCoordinator(address, token, timeout=_SECONDS)))
            for _ in configs
        ]
        for link, config in zip(links, configs, strict=True):
            link.bring(brought(config))
        memory = [_resident(links[0])]  # of the base, then with one experiment, then with all
        for count in (1, bench.experiments):  # which warms up, too
            _round(bench, address, links[:count], configs[:count], count, 1)
            memory.append(_resident(links[0]))
        one, several = [], []
        for number in range(bench.experiments + 1, bench.experiments + 1 + bench.repeats):
            one.append(_round(bench, address, links[:1], configs[:1], 2 * number, len(configs)))
            several.append(_round(bench, address, links, configs, 2 * number + 1, 1))
    tokens = bench.experiments * bench.micro_batches * preset.batch * preset.sequence
    expected = memory[0] + bench.experiments * (memory[1] - memory[0])
    return Figures(
        name="experiments",
        title=f"{bench.preset}: {bench.experiments * bench.micro_batches} micro-batches of "
        f"{preset.batch} x {preset.sequence} tokens, LoRA r = {RANK}",
        machine=describe_machine(),
        settings={name: getattr(bench, name) for name in ExperimentsBench.__slots__},
        rows=[
            _row("one experiment", one, tokens, memory[1], memory[1]),
            _row(f"{bench.experiments} experiments", several, tokens, memory[2], expected),
        ],
    )


def _row(what: str, seconds: Sequence[float], tokens: int, memory: float, expected: float) -> Row:
    row = Row(what=what, seconds=tuple(seconds), base="one experiment")
    beside = {
        "tokens/s": tokens / row.median,
        "trunk MiB": memory / _MIB,
        "base + states MiB": expected / _MIB,
    }
    return replace(row, beside=beside)


def _config(bench: ExperimentsBench, path: Path, seed: int) -> RunConfig:
    """Return the configuration of one experiment; the first one's is the trunk's own, too."""
    preset = PRESETS[bench.preset]
    part = LoraPartConfig(r=RANK, alpha=float(ALPHA))
    return RunConfig(
        seed=seed,
        num_clients=bench.experiments,
        model=ModelConfig(
            name=str(path),
            first_cut=preset.cuts[0],
            second_cut=preset.cuts[1],
            dtype=preset.dtype,
        ),
        lora=LoraConfigs(bottom=part, trunk=part, top=part),
        train=TrainConfig(local_steps=bench.micro_batches),
        trunk=TrunkConfig(
            step_every="server-round",
            max_experiments=max(2, bench.experiments),
            device=bench.device,
            num_threads=bench.num_threads,
            call_timeout=_SECONDS,
        ),
    )


def _resident(link: TrunkCoordinator) -> float:
    """Return the bytes of the trunk's process: its accelerator's where it has one."""
    process = link.status().process
    return process.accelerator_bytes or process.resident_bytes


def _round(
    bench: ExperimentsBench,
    address: str,
    links: Sequence[TrunkCoordinator],
    configs: Sequence[RunConfig],
    server_round: int,
    clients: int,
) -> float:
    """Run a round of every experiment at once; return the seconds of all calls."""
    order: list[_Client] = []
    for number, (link, config) in enumerate(zip(links, configs, strict=True)):
        tokens = {slot: secrets.token_urlsafe(32) for slot in range(clients)}
        link.begin_round(
            RoundPlan(
                experiment=f"benchmark-{number}",
                server_round=server_round,
                attempt=0,
                participants=tokens,
                step_every=StepEvery.SERVER_ROUND,
                join_seconds=_SECONDS,
                window_seconds=_SECONDS,
            )
        )
        order += [_Client(token, config) for token in tokens.values()]
    with _joined(address, order) as trunks:
        seconds = _drive(trunks, bench)
        for number, link in enumerate(links):
            link.prepare_round(f"benchmark-{number}", server_round, 0)
            link.commit_round(f"benchmark-{number}", server_round, 0)
    return seconds


def serve(pipe: Connection, config: RunConfig, token: str, folder: str) -> None:
    """Serve a trunk of several experiments until the other end of ``pipe`` closes; send the port."""
    with RunningTrunk(config, Serving(token=token, checkpoints=f"{folder}/checkpoints")) as trunk:
        pipe.send(Answer((), {"port": float(trunk.port)}))
        try:
            pipe.recv()
        except EOFError:  # the benchmark has what it wants
            return


@contextmanager
def _joined(address: str, clients: Sequence[_Client]) -> Iterator[list[RemoteTrunk]]:
    """Let clients join their rounds, until the block ends."""
    with ExitStack() as stack:
        trunks = []
        for client in clients:
            fields = fingerprint(client.config)
            trunk = RemoteTrunk(
                address, token=client.token, fingerprint=fields, mode="joint", call_timeout=_SECONDS
            )
            stack.callback(trunk.close)
            trunk.open(1)
            trunks.append(trunk)
        yield trunks


def _drive(trunks: Sequence[RemoteTrunk], bench: ExperimentsBench) -> float:
    """Send all clients' micro-batches at once; return the seconds until the last is answered."""
    preset = PRESETS[bench.preset]
    shape = (preset.batch, preset.sequence, preset.hidden)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32).to(preset.torch_dtype)
    grad = 1e-3 * hidden
    mask = torch.ones(shape[:2], dtype=torch.int64)
    tokens = preset.batch * preset.sequence

    def calls(trunk: RemoteTrunk) -> None:
        for number in range(bench.micro_batches):
            last = number == bench.micro_batches - 1
            leaf = hidden.detach().requires_grad_()
            with trunk.micro_batch(
                0, number, num_tokens=tokens, loss_denominator=float(tokens), last=last
            ):
                output = trunk(leaf, attention_mask=mask)
            output.backward(grad)

    with ThreadPoolExecutor(len(trunks)) as pool:
        began = time.perf_counter()
        for done in [pool.submit(calls, trunk) for trunk in trunks]:
            done.result(_SECONDS)
        return time.perf_counter() - began
