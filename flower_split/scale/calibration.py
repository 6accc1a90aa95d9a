"""Costs from a real run: what its ``metrics.jsonl`` has of every step, every round and every client.

A run whose clients and trunk shared cores measured their waiting for a core too: calibrate with a run of
one client, or of clients on machines of their own.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import Json
from flower_split.scale.costs import Costs

_OF_A_STEP = ("compute_seconds", "wait_seconds", "trunk_seconds", "wire_seconds")
_HANDLED = 0.5  # share of a call's time on loopback that the trunk's interpreter is busy for it
_Records = Sequence[Mapping[str, Json]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a run measured."""

    costs: Costs
    steps: int  # optimizer steps of a client in a round, median
    eval_batches: int  # of a client, median
    training_seconds: float  # of a round, by its slowest client's steps; median
    notes: Sequence[str]  # what the run could not tell


def calibrate(run: RunDirectory, *, ends_together: bool) -> Calibration:
    """Return the costs that a run measured: medians over its steps and rounds.

    Args:
        run: The run's directory.
        ends_together: Whether its steps ended with a call for which all waited.

    Raises:
        ConfigError: The run has no steps yet, or had several micro-batches in flight, whose times overlap.
        RunDirectoryError: A line of its metrics is damaged.
    """
    train, notes = run.config.train, list[str]()
    count = train.gradient_accumulation_steps
    if min(count, train.micro_batches_in_flight) > 1:
        raise ConfigError(
            f"the run in {run.path} had {train.micro_batches_in_flight} micro-batches in flight, so the "
            "times of its calls overlap and its computing cannot be told. Calibrate with a run of "
            "train.micro-batches-in-flight = 1."
        )
    steps, trunk = run.metrics("step"), run.metrics("trunk")
    if not steps or not trunk:
        raise ConfigError(
            f"the run in {run.path} has trained no step over a trunk; name another run."
        )
    calls = count * (1 if run.config.mode == "forward-only" else 2) + ends_together
    warm = [
        step for step in steps if step["step"] != 0
    ] or steps  # a round's first step also warms up
    wire = _median(warm, "wire_seconds") / calls
    costs = Costs(
        client_seconds=_median(warm, "compute_seconds") / count,
        trunk_seconds=_trunk_seconds(trunk, steps, count),
        sent_bytes=_mean(steps, "bytes_sent") / count,
        received_bytes=_mean(steps, "bytes_received") / count,
        adapter_bytes=_adapter_bytes(run.metrics("bytes")),
        call_seconds=wire * (1 - _HANDLED),
        handling_seconds=wire * _HANDLED,
        step_seconds=_step_seconds(warm, notes),
        server_client_seconds=_server_seconds(run.metrics("aggregation")),
        round_seconds=_round_seconds(run, steps, notes),
    )
    data = run.metrics("data")
    examples = _median(data, "num_eval_examples") if data else 0.0
    batches = math.ceil(examples / train.batch_size)
    return Calibration(
        costs=costs,
        steps=train.local_steps or round(_median(data, "planned_steps")),
        eval_batches=min(batches, run.config.data.max_eval_batches or batches),
        training_seconds=statistics.median(_training_seconds(steps).values()),
        notes=notes,
    )


def _number(record: Mapping[str, Json], name: str) -> float:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _median(records: _Records, name: str) -> float:
    return statistics.median(_number(record, name) for record in records)


def _mean(records: _Records, name: str) -> float:
    return statistics.fmean(_number(record, name) for record in records)


def _trunk_seconds(trunk: _Records, steps: _Records, count: int) -> float:
    """Return the trunk's seconds for a micro-batch, by its own count of each round."""
    each = []
    for line in trunk:
        made = sum(step["server_round"] == line["server_round"] for step in steps) * count
        if made:
            each.append(_number(line, "compute_seconds") / made)
    return statistics.median(each) if each else 0.0


def _adapter_bytes(lines: _Records) -> float:
    sent = [_number(line, "adapters_up") for line in lines if _number(line, "adapters_up")]
    return statistics.fmean(sent) if sent else 0.0


def _step_seconds(steps: _Records, notes: list[str]) -> float:
    """Return the trunk's seconds for its optimizer step: what one client alone waits for."""
    if len({step["partition_id"] for step in steps}) == 1:
        return _median(steps, "wait_seconds")
    notes.append(
        "several clients waited for each other, so the trunk's optimizer step is in no time of the run: "
        "it counts 0 unless --cost step-seconds=S says otherwise."
    )
    return 0.0


def _server_seconds(lines: _Records) -> float:
    each = []
    for line in lines:
        clients = line.get("clients")
        if isinstance(clients, Sequence) and clients:
            each.append(_number(line, "seconds") / len(clients))
    return statistics.median(each) if each else 0.0


def _training_seconds(steps: _Records) -> dict[int, float]:
    """Return for each round the seconds of the client whose steps took the longest."""
    spent: dict[tuple[int, int], float] = {}
    for step in steps:
        key = int(_number(step, "server_round")), int(_number(step, "partition_id"))
        spent[key] = spent.get(key, 0.0) + sum(_number(step, name) for name in _OF_A_STEP)
    rounds: dict[int, float] = {}
    for (server_round, _), seconds in spent.items():
        rounds[server_round] = max(rounds.get(server_round, 0.0), seconds)
    return rounds


def _round_seconds(run: RunDirectory, steps: _Records, notes: list[str]) -> float:
    """Return what a round takes beside its steps and the aggregation, where it does not evaluate."""
    training = _training_seconds(steps)
    evaluated = {int(_number(line, "server_round")) for line in run.metrics("evaluation")}
    aggregated = {
        int(_number(line, "server_round")): _number(line, "seconds")
        for line in run.metrics("aggregation")
    }
    beside = []
    for line in run.metrics("round"):
        number = int(_number(line, "server_round"))
        if number in training and number not in evaluated:
            spent = training[number] + aggregated.get(number, 0.0)
            beside.append(max(0.0, _number(line, "seconds") - spent))
    if beside:
        return statistics.median(beside)
    notes.append(
        "every round of the run was evaluated, so what a round takes beside its steps is not known: it "
        "counts 0 unless --cost round-seconds=S says otherwise."
    )
    return 0.0
