"""Tokens a second of a trunk by the number of clients that train with it at once.

The trunk is a process of its own, with digests, finite checks, exactly-once and its budget of saved
activations. The clients are threads of one other process, each with a session and connections of its
own, which send random hidden states and gradients as fast as they are answered: what is measured is the
trunk, not the machines of the clients. The reference is the trunk's arithmetic alone, without a wire, on
the same micro-batch in the same run.
"""

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from flower_split.bench.clients_load import WARM_UP, run_arithmetic, run_load, tokens_of
from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.bench.presets import ALPHA, PRESETS, RANK, write_checkpoint
from flower_split.bench.step_parties import Answer, Worker
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrunkConfig,
)
from flower_split.protocol.values import RoundPlan, TrunkStatus
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_process import TrunkProcess

_START_SECONDS = 300.0
_ALONE = "the arithmetic alone"
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientsBench:
    """What is measured."""

    preset: str = "tiny"
    clients: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    rows_each: int = 1  # sequences of a client's micro-batch
    steps: int = 2  # windows of a turn that count
    repeats: int = 3  # turns, each of every number of clients
    transport: str = "auto"
    window_batches: str = "off"
    activation_memory: float = 1.0  # GiB, over all clients
    device: str = "cpu"
    num_threads: int = 1  # of the trunk


def measure_clients(bench: ClientsBench) -> Figures:
    """Time the arithmetic alone, then every number of clients in turns."""
    preset = PRESETS[bench.preset]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_checkpoint(preset, path, bench.device)
        order = (_config(bench, path),)
        with closing(Worker(run_arithmetic, order, bench.num_threads)) as worker:
            alone = worker.answer()
        rows = [Row(what=_ALONE, seconds=tuple(alone.seconds), beside=_rate(bench, alone))]
        rows += _rows(bench, path)
    return Figures(
        name="clients",
        title=f"{bench.preset}: one micro-batch of {bench.rows_each} x {preset.sequence} tokens of one "
        "client, by how many train at once",
        machine=describe_machine(),
        settings={name: getattr(bench, name) for name in ClientsBench.__slots__},
        rows=_with_shares(rows),
    )


def _with_shares(rows: list[Row]) -> list[Row]:
    """Return the rows, those of clients with their share of the best rate among them."""
    best = max((row.beside["tokens/s"] for row in rows[1:]), default=0.0)
    return rows[:1] + [
        replace(row, beside={**row.beside, "of the best": row.beside["tokens/s"] / best})
        for row in rows[1:]
    ]


def _rate(bench: ClientsBench, answer: Answer) -> dict[str, float]:
    tokens = bench.rows_each * PRESETS[bench.preset].sequence
    return {"tokens/s": tokens / statistics.median(answer.seconds)}


def _config(bench: ClientsBench, path: Path) -> RunConfig:
    preset = PRESETS[bench.preset]
    part = LoraPartConfig(r=RANK, alpha=float(ALPHA))
    return RunConfig(
        num_server_rounds=1,
        num_clients=max(bench.clients),
        model=ModelConfig(
            name=str(path),
            first_cut=preset.cuts[0],
            second_cut=preset.cuts[1],
            dtype=preset.dtype,
        ),
        lora=LoraConfigs(bottom=part, trunk=part, top=part),
        train=TrainConfig(
            local_steps=bench.steps,
            batch_size=bench.rows_each,
            sequence_length=preset.sequence,
            device="cpu",
        ),
        trunk=TrunkConfig(
            transport=bench.transport,
            activation_memory=bench.activation_memory,
            call_timeout=_START_SECONDS,
            num_threads=bench.num_threads,
            device=bench.device,
            window_batches=bench.window_batches,
        ),
    )


def _rows(bench: ClientsBench, path: Path) -> list[Row]:
    """Return the rows of every number of clients, each a round of one trunk's."""
    config = _config(bench, path)
    with (
        closing(TrunkProcess.start(config, _START_SECONDS)) as trunk,
        closing(Worker(run_load, (config, trunk.address), 1)) as load,
        closing(TrunkCoordinator(trunk.address, trunk.token, timeout=120.0)) as control,
    ):
        load.answer()  # it is there
        turns = [
            [_row(bench, load, control, turn, count) for count in bench.clients]
            for turn in range(bench.repeats)
        ]
    return [_joined(bench, rows) for rows in zip(*turns, strict=True)]


def _joined(bench: ClientsBench, rows: Sequence[Row]) -> Row:
    """Return the row of one number of clients over all turns; the memory is the last one's."""
    seconds = tuple(second for row in rows for second in row.seconds)
    return replace(
        rows[-1], seconds=seconds, beside={**rows[-1].beside, **_rate(bench, Answer(seconds))}
    )


def _row(
    bench: ClientsBench, load: Worker, control: TrunkCoordinator, turn: int, count: int
) -> Row:
    """Return the row of ``count`` clients: their windows' seconds, divided by how many they are."""
    plan = RoundPlan(
        experiment=f"benchmark-{turn}-{count}",
        server_round=1,
        attempt=0,
        participants=tokens_of(turn, count),
        steps_per_round=bench.steps + WARM_UP,
        join_seconds=_START_SECONDS,
        window_seconds=_START_SECONDS,
    )
    control.begin_round(plan)
    load.tell(f"{turn} {count}")
    answer = load.answer()
    status = control.status()
    control.prepare_round(plan.experiment, 1, 0)
    control.commit_round(plan.experiment, 1, 0)
    each = Answer([seconds / count for seconds in answer.seconds])
    return Row(
        what=f"{count} clients",
        seconds=tuple(each.seconds),
        base=_ALONE,
        beside={**_rate(bench, each), **_memory(status)},
    )


def _memory(status: TrunkStatus) -> dict[str, float]:
    held = status.activations
    return {
        "activations MiB": held.peak_bytes / _MIB,
        "budget MiB": held.budget_bytes / _MIB,
        "recomputed": float(held.recomputes),
        "trunk MiB": status.process.resident_bytes / _MIB,
    }
