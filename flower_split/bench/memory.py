"""The trunk alone: memory and seconds of one training step, on one GPU, over several, and quantised.

One micro-batch goes forward and backward through a Llama's middle layers with LoRA of rank 16, then
the optimizer steps; everything is what the trunk server does, without the wire. The weights are
random. The variants run one after the other in one process. Variants that this machine cannot run
(fewer GPUs, no bitsandbytes) are left out.
"""

import gc
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.presets import ALPHA, PRESETS, RANK, Preset, write_checkpoint
from flower_split.config import LoraPartConfig, OptimizerConfig
from flower_split.lora import attach_lora
from flower_split.split import CutLayers, load_trunk_model
from flower_split.split.structure.compute_mode import compute_fast
from flower_split.trunk.compute.compute import TrunkCompute

_GIB = 2**30
_WARM_UP = 2  # steps that do not count


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBench:
    """What is measured."""

    preset: str = "tiny"
    steps: int = 8  # that count
    device: str = "cpu"
    compute: str = "exact"


@dataclass(frozen=True, slots=True)
class _Variant:
    """How the trunk is loaded."""

    name: str
    quantization: str | None = None
    spread: bool = False  # over all GPUs


def measure_memory(bench: MemoryBench) -> Figures:
    """Measure every variant that this machine can run; the first is what the others are compared with."""
    preset = PRESETS[bench.preset]
    variants = _variants(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(preset, path, bench.device)
        rows = [_row(preset, path, variant, variants[0].name, bench) for variant in variants]
    return Figures(
        name="memory",
        title=f"{bench.preset}: a step of a trunk of {preset.cuts[1] - preset.cuts[0]} layers, "
        f"{preset.dtype}, {preset.batch} x {preset.sequence} tokens, {bench.compute}",
        machine=describe_machine(),
        settings={"preset": bench.preset, "steps": bench.steps, "compute": bench.compute},
        rows=rows,
    )


def _variants(device: str) -> list[_Variant]:
    """Return what this machine can run."""
    found = [_Variant("one device")]
    if device == "cuda" and torch.cuda.device_count() > 1:
        found.append(_Variant(f"{torch.cuda.device_count()} devices, balanced", spread=True))
    if find_spec("bitsandbytes") is not None:
        found += [_Variant(f"one device, {name}", name) for name in ("bnb-8bit", "bnb-4bit")]
    return found


def _row(preset: Preset, path: Path, variant: _Variant, base: str, bench: MemoryBench) -> Row:
    """Load, step, read the clock and the memory."""
    gc.collect()
    gpus = torch.cuda.device_count() if variant.spread else 1
    devices = [torch.device("cuda", index) for index in range(gpus)]
    if bench.device == "cpu":
        devices = []
    else:
        torch.cuda.empty_cache()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    compute = _load(preset, path, variant, bench)
    weights = sum(parameter.nbytes for parameter in compute.trunk.parameters())
    seconds = _step_seconds(compute, preset, bench, devices)
    beside = {"weights GiB": weights / _GIB}
    if devices:
        peaks = [torch.cuda.max_memory_allocated(device) / _GIB for device in devices]
        beside |= {"peak GiB": sum(peaks), "largest device GiB": max(peaks)}
    return Row(what=variant.name, seconds=seconds, base=base, beside=beside)


def _load(preset: Preset, path: Path, variant: _Variant, bench: MemoryBench) -> TrunkCompute:
    trunk = load_trunk_model(
        str(path),
        CutLayers(*preset.cuts),
        dtype=preset.dtype,
        quantization=variant.quantization,
        device=None if variant.spread else bench.device,
        device_map="balanced" if variant.spread else None,
    )
    trunk.requires_grad_(False)
    attach_lora(trunk, trunk.cuts, {"trunk": LoraPartConfig(r=RANK, alpha=float(ALPHA))}, seed=0)
    fast = bench.compute == "fast"
    if fast:
        compute_fast(trunk, trunk.stack.layers(trunk))
    compute = TrunkCompute(trunk, OptimizerConfig(learning_rate=1e-4), seed=0, fused=fast)
    compute.plan(bench.steps + _WARM_UP)
    return compute


def _step_seconds(
    compute: TrunkCompute, preset: Preset, bench: MemoryBench, devices: list[torch.device]
) -> tuple[float, ...]:
    """Return the seconds of every step that counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (preset.batch, preset.sequence, preset.hidden)
    smashed = torch.randn(shape, generator=generator).to(bench.device, compute.dtype)
    output_grad = 1e-3 * torch.randn(shape, generator=generator).to(bench.device, compute.dtype)
    mask = torch.ones(shape[:2], dtype=torch.int64, device=bench.device)
    seconds = []
    for step in range(bench.steps + _WARM_UP):
        began = time.perf_counter()
        tensors = {"hidden_states": smashed, "attention_mask": mask}
        _, activation = compute.forward_train(tensors, seed_of=str(step))
        _, gradients = compute.backward(activation, output_grad)
        compute.step(gradients)
        for device in devices:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return tuple(seconds[_WARM_UP:])
