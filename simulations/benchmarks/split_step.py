"""Seconds of one training step: the unsplit model, the split model, and several clients at once.

Everything is the product's own: a trunk process on loopback, clients in processes of their own, the
local training spine. The model has random weights; the unsplit reference trains the same LoRA in one
process. All run in turns on one machine within one run, and the ratios are what counts.

Usage: ``python simulations/benchmarks/split_step.py [--preset tiny|small|1b|7b] [--clients 1 2 4 8]``
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.lora import attach_lora
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import all_parts, client_parts, model_cuts
from flower_split.protocol.values import RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_process import TrunkProcess
from flower_split.split import load_client_model, load_whole_model
from flower_split.split.structure.compute_mode import compute_fast, under_autocast
from flower_split.split.structure.stack import find_stack
from flower_split.training.loss import Batch
from flower_split.training.measures import RoundPosition, StepMetrics
from flower_split.training.round import train_round


@dataclass(frozen=True)
class Preset:
    """A model and a batch."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    cuts: tuple[int, int]
    batch: int
    sequence: int
    dtype: str


PRESETS = {
    "tiny": Preset(128, 8, 4, 352, 2048, (2, 6), 8, 128, "float32"),
    "small": Preset(768, 12, 12, 2048, 32000, (2, 10), 8, 128, "float32"),
    "1b": Preset(2048, 16, 16, 5632, 32000, (1, 15), 8, 512, "bfloat16"),
    "7b": Preset(4096, 32, 32, 11008, 32000, (2, 30), 8, 512, "bfloat16"),
}


def write_checkpoint(preset: Preset, path: Path, device: str) -> None:
    """A Llama of the preset's size with random weights."""
    config = LlamaConfig(
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        intermediate_size=preset.intermediate,
        vocab_size=preset.vocab,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, preset.dtype))
    model.save_pretrained(path)


def make_config(
    preset: Preset, path: Path, args: argparse.Namespace, rows: int = 0, clients: int = 1
) -> RunConfig:
    """LoRA of rank 16 on every part; of rows and clients a trunk in mode fast makes its first shapes."""
    part = LoraPartConfig(r=16, alpha=32.0)
    return RunConfig(
        num_server_rounds=1,
        num_clients=clients,
        model=ModelConfig(
            name=str(path),
            first_cut=preset.cuts[0],
            second_cut=preset.cuts[1],
            dtype=preset.dtype,
            quantization=args.quantization,
        ),
        lora=LoraConfigs(bottom=part, trunk=part, top=part),
        train=TrainConfig(
            local_steps=args.steps,
            batch_size=rows or preset.batch,
            sequence_length=preset.sequence,
            gradient_accumulation_steps=args.accumulate,
            micro_batches_in_flight=args.in_flight,
            num_threads=args.threads,
            compute=args.compute,
        ),
        trunk=TrunkConfig(
            compute=args.compute,
            activation_memory=args.activation_memory,
            num_threads=args.threads,
            wire_dtype=args.wire_dtype,
            device_map=args.device_map,
            window_batches=args.window_batches,
            window_batch_positions=args.batch_positions,
        ),
    )


def batches(preset: Preset, rows: int, count: int, seed: int) -> list[Batch]:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(0, preset.vocab, (rows, preset.sequence), generator=generator)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return result


def place(args: argparse.Namespace, slot: int) -> RoundPosition:
    """One round of the steps asked for."""
    return RoundPosition(
        server_round=1, num_server_rounds=1, num_steps=args.steps, partition_id=slot
    )


def seconds_of(steps: Sequence[StepMetrics]) -> list[float]:
    """Wall-clock seconds of every step but the first two, which warm up."""
    return [
        s.compute_seconds + s.wait_seconds + s.trunk_seconds + s.wire_seconds for s in steps[2:]
    ]


def run_unsplit(preset: Preset, args: argparse.Namespace, path: Path, rows: int, pipe: Connection):
    """Send the seconds of each step of the unsplit model."""
    config = make_config(preset, path, args)
    torch.set_num_threads(args.threads)
    model = load_whole_model(
        str(path),
        dtype=preset.dtype,
        device=args.device,
        quantization=args.quantization or None,
    )
    attach_lora(model, model_cuts(config), all_parts(config), seed=0)
    # What a user runs: plain PEFT, eager, under autocast where the base has 16 bits.
    vars(model)["forward"] = under_autocast(model, model.forward)
    data = batches(preset, rows, args.steps * args.accumulate, 0)
    pipe.send(train_round(model, iter(data), config, place(args, 0), None).steps)


def run_client(
    preset: Preset, args: argparse.Namespace, path: Path, rows: int, pipe: Connection
) -> None:
    """Load, say so, wait for ``(address, slot)``, train, send the steps."""
    config = make_config(preset, path, args)
    torch.set_num_threads(args.threads)
    address, slot = pipe.recv()
    trunk = RemoteTrunk(
        address,
        token=f"token-{slot}",
        fingerprint=fingerprint(config),
        mode="joint",
        call_timeout=120.0,
    )
    model = load_client_model(
        str(path),
        model_cuts(config),
        trunk,
        dtype=preset.dtype,
        device=args.device,
        quantization=args.quantization or None,
    )
    attach_lora(model, model_cuts(config), client_parts(config), seed=0)
    if args.compute == "fast":
        compute_fast(model, find_stack(model).layers(model))
    data = batches(preset, rows, args.steps * args.accumulate, slot)
    pipe.send("ready")
    pipe.recv()
    trunk.open(args.steps)
    result = train_round(model, iter(data), config, place(args, slot), trunk)
    trunk.close()
    pipe.send(result.steps)


def in_process(target, preset: Preset, args: argparse.Namespace, path: Path, rows: int):
    """A spawned process and this end of its pipe."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(preset, args, path, rows, theirs)
    )
    process.start()
    return process, ours


def receive(pipe: Connection, process) -> list[StepMetrics]:
    """What a process sends, or an error when it ends first or takes ten minutes."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if pipe.poll(1.0):
            return pipe.recv()
        if not process.is_alive() and not pipe.poll(0):
            break
    raise SystemExit("a benchmark process ended without a result, or took over 600 s")


def measure_unsplit(preset, args, path, rows) -> list[StepMetrics]:
    """The steps of the unsplit model in a process of its own."""
    process, pipe = in_process(run_unsplit, preset, args, path, rows)
    steps = receive(pipe, process)
    process.join(60)
    return steps


def measure_split(preset, args, path, rows, count: int) -> list[StepMetrics]:
    """The steps of the first of ``count`` clients that train at once."""
    config = make_config(preset, path, args, rows, count)
    with closing(TrunkProcess.start(config, 600.0)) as trunk:
        coordinator = TrunkCoordinator(trunk.address, trunk.token, timeout=120.0)
        clients = [in_process(run_client, preset, args, path, rows) for _ in range(count)]
        for slot, (_, pipe) in enumerate(clients):
            pipe.send((trunk.address, slot))
        for process, pipe in clients:
            receive(pipe, process)
        coordinator.begin_round(
            RoundPlan(
                experiment="benchmark",
                server_round=1,
                attempt=0,
                participants={slot: f"token-{slot}" for slot in range(count)},
                steps_per_round=args.steps,
            )
        )
        for _, pipe in clients:
            pipe.send("go")
        steps = [receive(pipe, process) for process, pipe in clients]
        for process, _ in clients:
            process.join(60)
        coordinator.close()
    return steps[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compute", choices=["exact", "fast"], default="exact")
    parser.add_argument(
        "--window-batches", choices=["off", "on"], default="off", help="as trunk.window-batches"
    )
    parser.add_argument(
        "--batch-positions", type=int, default=8192, help="as trunk.window-batch-positions"
    )
    parser.add_argument("--wire-dtype", default="native")
    parser.add_argument("--activation-memory", type=float, default=60.0, help="GiB")
    parser.add_argument("--quantization", default="", help="as model.quantization")
    parser.add_argument("--device-map", default="", help="as trunk.device-map")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    table = Table(title=f"{args.preset}: {preset.batch} x {preset.sequence} tokens in all, {args}")
    for name in ("what", "s/step", "x unsplit", "client", "wait", "trunk", "wire", "MB/step"):
        table.add_column(name, justify="left" if name == "what" else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(preset, path, args.device)
        reference = 0.0
        for count in [0, *args.clients]:
            rows = preset.batch // max(count, 1)
            if count == 0:
                steps = measure_unsplit(preset, args, path, rows)
            else:
                steps = measure_split(preset, args, path, rows, count)
            median = statistics.median(seconds_of(steps))
            reference = reference or median
            mean = {
                name: statistics.median(getattr(s, name) for s in steps[2:])
                for name in ("compute_seconds", "wait_seconds", "trunk_seconds", "wire_seconds")
            }
            moved = statistics.median(s.bytes_sent + s.bytes_received for s in steps) / 1e6
            table.add_row(
                f"{count} clients x {rows} sequences" if count else f"unsplit, {rows} sequences",
                f"{median:.3f}",
                f"{median / reference:.2f}",
                *(f"{seconds:.3f}" for seconds in mean.values()),
                f"{moved:.1f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
