"""The trunk alone: memory and seconds of one training step, on one GPU, over several, and quantised.

One micro-batch goes forward and backward through a Llama's middle layers with LoRA of rank 16, then
the optimizer steps; everything is what the trunk server does, without the wire. The weights are
random. The variants run in turns within one process, and the ratios to the first are what counts.
Variants that this machine cannot run (fewer GPUs, no bitsandbytes) are left out.

Usage: ``python simulations/benchmarks/trunk_memory.py [--preset tiny|1b|7b] [--steps 8]``
"""

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from split_step import PRESETS, Preset, write_checkpoint

from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.lora import attach_lora
from flower_split.runtime.logs import quiet_libraries
from flower_split.split import CutLayers, load_trunk_model
from flower_split.trunk.compute.compute import TrunkCompute

GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """How the trunk is loaded."""

    name: str
    quantization: str | None = None
    spread: bool = False  # over all GPUs


@dataclass(frozen=True)
class Result:
    """What one variant took."""

    seconds: float  # a step, median
    weights: list[int]  # bytes on each device after loading
    peak: list[int]  # bytes on each device during a step


def variants(device: str) -> list[Variant]:
    """What this machine can run."""
    found = [Variant("one device")]
    if device == "cuda" and torch.cuda.device_count() > 1:
        found.append(Variant(f"{torch.cuda.device_count()} devices, balanced", spread=True))
    if find_spec("bitsandbytes") is not None:
        found += [Variant(f"one device, {name}", name) for name in ("bnb-8bit", "bnb-4bit")]
    return found


def devices_of(device: str, variant: Variant) -> list[torch.device]:
    """The devices whose memory is read."""
    if device == "cpu":
        return []
    return [
        torch.device("cuda", i) for i in range(torch.cuda.device_count() if variant.spread else 1)
    ]


def measure(preset: Preset, path: Path, variant: Variant, args: argparse.Namespace) -> Result:
    """Load, step, read the clock and the memory."""
    devices = devices_of(args.device, variant)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    trunk = load_trunk_model(
        str(path),
        CutLayers(*preset.cuts),
        dtype=preset.dtype,
        quantization=variant.quantization,
        device=None if variant.spread else args.device,
        device_map="balanced" if variant.spread else None,
    )
    weights = [torch.cuda.memory_allocated(device) for device in devices]
    if not devices:
        weights = [sum(parameter.nbytes for parameter in trunk.parameters())]
    trunk.requires_grad_(False)
    attach_lora(trunk, trunk.cuts, {"trunk": LoraPartConfig(r=16, alpha=32.0)}, seed=0)
    compute = TrunkCompute(trunk, OptimizerConfig(learning_rate=1e-4), seed=0)
    compute.plan(args.steps + 2)
    generator = torch.Generator().manual_seed(0)
    shape = (preset.batch, preset.sequence, preset.hidden)
    smashed = torch.randn(shape, generator=generator).to(args.device, compute.dtype)
    output_grad = 1e-3 * torch.randn(shape, generator=generator).to(args.device, compute.dtype)
    mask = torch.ones(shape[:2], dtype=torch.int64, device=args.device)
    seconds = []
    for step in range(args.steps + 2):
        begin = time.perf_counter()
        tensors = {"hidden_states": smashed, "attention_mask": mask}
        _, activation = compute.forward_train(tensors, seed_of=str(step))
        _, gradients = compute.backward(activation, output_grad)
        compute.step(gradients)
        for device in devices:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    peak = [torch.cuda.max_memory_allocated(device) for device in devices]
    return Result(statistics.median(seconds[2:]), weights, peak)


def gib(values: list[int]) -> str:
    """Bytes of every device, as GiB."""
    return " + ".join(f"{value / GIB:.2f}" for value in values) or "–"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    quiet_libraries()
    table = Table(
        title=f"{args.preset}: trunk of {preset.cuts[1] - preset.cuts[0]} layers, {preset.dtype}, "
        f"{preset.batch} x {preset.sequence} tokens"
    )
    for name in (
        "trunk",
        "s/step",
        "x one",
        "weights GiB",
        "x one",
        "peak GiB",
        "largest device x one",
    ):
        table.add_column(name, justify="left" if name == "trunk" else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(preset, path, args.device)
        base: Result | None = None
        for variant in variants(args.device):
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            result = measure(preset, path, variant, args)
            base = base or result
            peaks = (max(result.peak), max(base.peak)) if result.peak else (1, 1)
            table.add_row(
                variant.name,
                f"{result.seconds:.3f}",
                f"{result.seconds / base.seconds:.2f}",
                gib(result.weights),
                f"{sum(result.weights) / sum(base.weights):.2f}",
                gib(result.peak),
                f"{peaks[0] / peaks[1]:.2f}",
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
