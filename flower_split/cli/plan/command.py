"""``flower-split plan``: memory, bytes and seconds of a job, from the model's configuration alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flower_split.cli.app_config import load_app_config
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, DryRun, PartRun, dry_run
from flower_split.cli.plan.speed import probe_flops
from flower_split.cli.plan.wire_bytes import StepBytes, experiment_name, step_bytes
from flower_split.config import OptimizerConfig, RunConfig
from flower_split.errors import ConfigError
from flower_split.runtime.exit_codes import COMPLETED
from flower_split.runtime.memory import resident_bytes
from flower_split.server.federation.handshake import num_participants

_GIB, _MIB = 1 << 30, 1 << 20
_GIGA, _MEGA = 1e9, 1e6
_FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCommand:
    """What the command line asks for."""

    app: Path
    run_config: Sequence[str] | None = None  # values of --run-config
    link: float = 100.0  # megabits a second, each way, of one client
    latency: float = 20.0  # milliseconds, there and back
    client_gflops: float = 0.0  # a second; 0: this machine is probed
    trunk_gflops: float = 0.0
    as_json: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.link <= 0 or self.latency < 0 or min(self.client_gflops, self.trunk_gflops) < 0:
            raise ConfigError(
                "--link must be above 0, and --latency, --client-gflops and --trunk-gflops at least 0."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One process's memory while it trains, beside what Python and its libraries take."""

    weights: int  # bytes of the base
    training: int  # of what trains: weights, gradients, optimizer state and their copies
    activations: int  # at the most

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.training + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """One optimizer step, of clients that wait for each other."""

    client: float  # computing
    trunk: float  # computing, for all clients one after the other
    wire: float

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        return self.client + self.trunk + self.wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a job needs."""

    client: Memory
    trunk: Memory
    process: int  # bytes that Python and its libraries take, each process
    wire: StepBytes  # of one client, in one optimizer step
    seconds: Seconds


def plan(command: PlanCommand) -> int:
    """Print what the job in ``command.app`` needs.

    Raises:
        FlowerSplitError: The app, the model or the cut layers are wrong.
    """
    config = load_app_config(command.app, command.run_config)
    run = dry_run(config)
    found = Plan(
        client=client_memory(config, run),
        trunk=trunk_memory(config, run),
        process=resident_bytes(),
        wire=step_bytes(config, run, experiment_name(config)),
        seconds=step_seconds(config, run, command),
    )
    if command.as_json:
        print(json.dumps(asdict(found)))
    else:
        print("\n".join(_lines(config, run, command, found)))
    return COMPLETED


def client_memory(config: RunConfig, run: DryRun) -> Memory:
    """Return the memory of a client while it trains a round."""
    part, hidden = run.parts[CLIENT], _hidden_bytes(run)
    in_flight = min(config.train.micro_batches_in_flight, config.train.gradient_accumulation_steps)
    # Kept twice beside the model: as it arrived, and as it is answered.
    adapter = (
        3 * part.trained_bytes + part.trained_bytes + moments_bytes(part, config.train.optimizer)
    )
    # trunk_output and smashed_grad arrive in buffers of their own.
    waiting = (in_flight - 1) * (part.waiting_bytes + hidden)
    return Memory(
        weights=part.base_bytes,
        training=adapter,
        activations=part.peak_bytes + waiting + 2 * hidden,
    )


def trunk_memory(config: RunConfig, run: DryRun, at_once: int | None = None) -> Memory:
    """Return the memory of a trunk that so many clients use at once; None: all of a round."""
    part, hidden, clients = run.parts[TRUNK], _hidden_bytes(run), at_once or _at_once(config)
    in_flight = min(config.train.micro_batches_in_flight, config.train.gradient_accumulation_steps)
    moments = moments_bytes(part, config.trunk.optimizer)
    # The weights that every experiment and the open round began with, and each client's gradient.
    training = (3 + clients) * part.trained_bytes + 2 * moments
    kept = clients * in_flight * (part.waiting_bytes + hidden)
    kept = min(kept, int(config.trunk.activation_memory * _GIB))
    working = max(0, part.peak_bytes - part.waiting_bytes)
    return Memory(
        weights=part.base_bytes,
        training=training,
        activations=kept + working + clients * hidden,
    )


def micro_batch_seconds(
    config: RunConfig, run: DryRun, command: PlanCommand
) -> tuple[float, float]:
    """Return the seconds that client and trunk compute for one micro-batch.

    Where no rate is given, it is that of this machine, by a probe.
    """
    rates = [command.client_gflops * _GIGA, command.trunk_gflops * _GIGA]
    threads = [config.train.num_threads, config.trunk.num_threads]
    probed: dict[int, float] = {}
    for index, rate in enumerate(rates):
        if rate == 0:
            count = threads[index]
            if count not in probed:
                probed[count] = _probe(run, count)
            rates[index] = probed[count]
    return run.parts[CLIENT].flops / rates[0], run.parts[TRUNK].flops / rates[1]


def step_seconds(config: RunConfig, run: DryRun, command: PlanCommand) -> Seconds:
    """Return the seconds of one optimizer step; where no rate is given, by a probe of this machine."""
    client, trunk = micro_batch_seconds(config, run, command)
    micro_batches = config.train.gradient_accumulation_steps
    moved = step_bytes(config, run, experiment_name(config))
    calls = micro_batches * (1 if config.mode == "forward-only" else 2)
    bits = 8 * (moved.sent + moved.received)
    return Seconds(
        client=micro_batches * client,
        trunk=_at_once(config) * micro_batches * trunk,
        wire=bits / (command.link * _MEGA) + calls * command.latency / 1000,
    )


def _probe(run: DryRun, threads: int) -> float:
    rows, positions, width = run.hidden_shape
    return probe_flops(rows * positions, width, run.intermediate_size, run.hidden_dtype, threads)


def _at_once(config: RunConfig) -> int:
    return num_participants(config.num_clients, config.fraction_train)


def moments_bytes(part: PartRun, optimizer: OptimizerConfig) -> int:
    """Return the bytes of an optimizer's state."""
    return 0 if optimizer.name == "sgd" else 2 * _FP32 * part.trained_values


def _hidden_bytes(run: DryRun) -> int:
    return math.prod(run.hidden_shape) * run.hidden_dtype.itemsize if run.hidden_shape else 0


def _lines(config: RunConfig, run: DryRun, command: PlanCommand, found: Plan) -> list[str]:
    dtype = str(run.hidden_dtype).removeprefix("torch.")
    seconds, wire = found.seconds, found.wire
    given = [command.client_gflops, command.trunk_gflops]
    rates = "rates as given" if all(given) else "rates of this machine, by a probe"
    return [
        f"{config.model.name} in {dtype}, cut layers {config.model.first_cut}:{config.model.second_cut}, "
        f"micro-batches of {run.hidden_shape[0]} x {run.hidden_shape[1]} tokens, "
        f"{config.train.gradient_accumulation_steps} a step, {_at_once(config)} clients at once",
        _memory("client", found.client, found.process),
        _memory("trunk", found.trunk, found.process),
        f"wire    {wire.sent / _MIB:,.2f} MiB out, {wire.received / _MIB:,.2f} MiB in, for each client in "
        "each optimizer step",
        f"step    {seconds.total:,.2f} s: client {seconds.client:,.2f}, trunk {seconds.trunk:,.2f}, wire "
        f"{seconds.wire:,.2f} ({command.link:g} Mbit/s, {command.latency:g} ms; {rates})",
        "Memory is of the CPU while a round trains, not while weights load; rows are taken to be full. "
        "Seconds count",
        "the layers' arithmetic: data, Python and waiting for a slower client come on top.",
    ]


def _memory(name: str, memory: Memory, process: int) -> str:
    return (
        f"{name:<7} {(memory.total + process) / _GIB:,.2f} GiB: base {memory.weights / _MIB:,.0f} MiB, "
        f"what trains {memory.training / _MIB:,.0f} MiB, activations {memory.activations / _MIB:,.0f} MiB, "
        f"Python and libraries {process / _MIB:,.0f} MiB"
    )
