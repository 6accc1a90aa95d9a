"""Seconds of one training step: plain PEFT in one process, and split over a trunk and its clients.

Everything split is the product's own: a trunk process on loopback, clients in processes of their own,
the local training spine, digests, finite checks and exactly-once. The reference is what a user runs
without a split: transformers and PEFT in one process, eager, under autocast where the weights have 16
bits; and the same with compiled layers. The models have random weights.
"""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.presets import ALPHA, PRESETS, RANK, write_checkpoint
from flower_split.bench.step_parties import (
    WARM_UP,
    Answer,
    Unsplit,
    Worker,
    run_client,
    run_unsplit,
)
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.protocol.values import RoundPlan
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_process import TrunkProcess

START_SECONDS = 600.0  # for a trunk to load and to compile


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBench:
    """What is measured."""

    preset: str = "tiny"
    device: str = "cpu"
    compute: tuple[str, ...] = ("exact",)
    transports: tuple[str, ...] = ("auto",)
    clients: tuple[int, ...] = (1,)
    rows_each: int = 0  # sequences of one client's micro-batch; 0: the preset's, divided
    steps: int = 8  # that count
    accumulate: int = 1  # micro-batches of a step
    in_flight: int = 2
    num_threads: int = 1
    kv_heads: int = 0  # 0: as many as heads
    wire_dtype: str = "native"
    gradient_wire_dtype: str = ""
    window_batches: str = "off"
    batch_positions: int = 8192  # of one joint pass of a window's batch
    activation_memory: float = 60.0  # GiB
    compiled: bool = False  # whether the reference runs compiled as well
    replicas: int = 1  # of the trunk; more: beside one, and clients over as many devices
    tensor_parallel: int = 1  # processes that divide the trunk's layers; more: the same

    @property
    def trunks(self) -> list[dict[str, int]]:
        """Return the kinds of trunk that are timed, by what they set of a ``TrunkConfig``."""
        several = {"replicas": self.replicas, "tensor_parallel": self.tensor_parallel}
        return [{}, *({key: count} for key, count in several.items() if count > 1)]

    def rows_of(self, clients: int) -> int:
        """Return the sequences of one client's micro-batch."""
        return self.rows_each or max(1, PRESETS[self.preset].batch // clients)


def measure_step(bench: StepBench) -> Figures:
    """Time the references and every split, one after the other."""
    preset = PRESETS[bench.preset]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(preset, path, bench.device, bench.kv_heads)
        rows: list[Row] = []
        for total in sorted({bench.rows_of(count) * count for count in bench.clients}):
            rows += _references(bench, path, total)
        for mode in bench.compute:
            for transport in bench.transports:
                for count in bench.clients:
                    for trunk in bench.trunks:
                        rows.append(_split(bench, path, mode, transport, count, trunk))
    return Figures(
        name="step",
        title=f"{bench.preset}: one step of {bench.accumulate} micro-batches, {preset.dtype}, "
        f"sequences of {preset.sequence} tokens, LoRA r = {RANK}",
        machine=describe_machine(),
        settings={name: getattr(bench, name) for name in StepBench.__slots__},
        rows=rows,
    )


def make_config(
    bench: StepBench,
    path: Path,
    mode: str,
    transport: str,
    clients: int,
    trunk: Mapping[str, int] = MappingProxyType({}),
) -> RunConfig:
    """Return the run config of one split.

    Args:
        bench: What is timed.
        path: Of the checkpoint.
        mode: How all parts compute.
        transport: Its name.
        clients: How many.
        trunk: One of :attr:`StepBench.trunks`.
    """
    preset = PRESETS[bench.preset]
    part = LoraPartConfig(r=RANK, alpha=float(ALPHA))
    return RunConfig(
        num_server_rounds=1,
        num_clients=clients,
        model=ModelConfig(
            name=str(path),
            first_cut=preset.cuts[0],
            second_cut=preset.cuts[1],
            dtype=preset.dtype,
        ),
        lora=LoraConfigs(bottom=part, trunk=part, top=part),
        train=TrainConfig(
            local_steps=bench.steps,
            batch_size=bench.rows_of(clients),
            sequence_length=preset.sequence,
            gradient_accumulation_steps=bench.accumulate,
            micro_batches_in_flight=bench.in_flight,
            num_threads=bench.num_threads,
            device=bench.device,
            compute=mode,
        ),
        trunk=TrunkConfig(
            compute=mode,
            transport=transport,
            activation_memory=bench.activation_memory,
            call_timeout=START_SECONDS,
            num_threads=bench.num_threads,
            device=bench.device,
            wire_dtype=bench.wire_dtype,
            gradient_wire_dtype=bench.gradient_wire_dtype,
            window_batches=bench.window_batches,
            window_batch_positions=bench.batch_positions,
            replicas=trunk.get("replicas", 1),
            tensor_parallel=trunk.get("tensor_parallel", 1),
        ),
    )


def _eager(rows: int) -> str:
    return f"unsplit PEFT, {rows} sequences"


def _references(bench: StepBench, path: Path, rows: int) -> list[Row]:
    """Return the unsplit model's rows, for as many sequences as all clients have together."""
    preset = PRESETS[bench.preset]
    found = []
    for compiled in (False, True) if bench.compiled else (False,):
        order = Unsplit(
            preset=preset,
            path=str(path),
            device=bench.device,
            rows=rows,
            steps=bench.steps,
            accumulate=bench.accumulate,
            compiled=compiled,
        )
        with closing(Worker(run_unsplit, (order,), bench.num_threads)) as worker:
            answer = worker.answer()
        what = _eager(rows) + (", compiled" if compiled else "")
        found.append(_row(what, _eager(rows), answer, rows, bench))
    return found


def _on(config: RunConfig, slot: int) -> RunConfig:
    """Return the configuration of a client, which shares a device with one of the trunk's processes."""
    count = config.trunk.processes
    if count == 1 or not config.train.device.startswith("cuda"):
        return config
    return replace(config, train=replace(config.train, device=f"cuda:{slot % count}"))


def _split(
    bench: StepBench, path: Path, mode: str, transport: str, count: int, kind: Mapping[str, int]
) -> Row:
    """Return the row of ``count`` clients that train at once with one kind of trunk."""
    rows = bench.rows_of(count)
    config = make_config(bench, path, mode, transport, count, kind)
    with closing(TrunkProcess.start(config, START_SECONDS)) as trunk:
        tokens = {slot: f"benchmark-token-{slot}" for slot in range(count)}
        workers = [
            Worker(
                run_client,
                (_on(config, slot), trunk.address, slot, token),
                bench.num_threads,
            )
            for slot, token in tokens.items()
        ]
        try:
            for worker in workers:
                worker.answer()  # its model is loaded
            with closing(TrunkCoordinator(trunk.address, trunk.token, timeout=120.0)) as control:
                plan = RoundPlan(
                    experiment="benchmark",
                    server_round=1,
                    attempt=0,
                    participants=tokens,
                    steps_per_round=bench.steps + WARM_UP,
                    join_seconds=START_SECONDS,
                    window_seconds=START_SECONDS,
                )
                control.begin_round(plan)
                for worker in workers:
                    worker.tell("go")
                answers = [worker.answer() for worker in workers]
                status = control.status()
                held = status.process.accelerator_peak_bytes
        finally:
            for worker in workers:
                worker.close()
    clients = f"{count} client{'s' * (count > 1)} x {rows}"
    what = f"split, {mode}, {transport}, {clients}"
    base = _eager(rows * count)
    for key, number in kind.items():
        several = f"{number} replicas" if key == "replicas" else f"layers over {number} processes"
        what, base = f"{what}, {several}", what
    row = _row(what, base, answers[0], rows * count, bench)
    return replace(row, beside={**row.beside, "trunk peak GiB": held / 2**30}) if held else row


def _row(what: str, base: str, answer: Answer, rows: int, bench: StepBench) -> Row:
    tokens = rows * bench.accumulate * PRESETS[bench.preset].sequence
    row = Row(what=what, seconds=tuple(answer.seconds), base=base)
    return replace(row, beside={"tokens/s": tokens / row.median, **answer.beside})
