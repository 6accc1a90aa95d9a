"""Seconds of a whole run, as ``flower-split run`` makes it, beside plain PEFT on the same tokens.

The run is the command itself, in a process of its own, with all that a user waits for: checks, Flower,
the processes of the clients and the trunk, evaluations, the baseline where the app has one. Its phases
are read from the run's ``metrics.jsonl``. The reference is :mod:`flower_split.bench.plain_peft`, with as
many threads as torch takes by itself. Both run in turns.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.client.client import stable_seed
from flower_split.config import RunConfig, resolved_run_config
from flower_split.config.model import CAUSAL_LM
from flower_split.errors import ConfigError, FederationError
from flower_split.runs.files import Json
from flower_split.runs.metrics import FILE, read_metrics

OURS, PLAIN = "flower-split run", "plain PEFT"
PHASES = ("start", "training", "evaluation", "baseline", "end")
_OF_KIND = {"data": "start", "evaluation": "evaluation", "step": "training"}
_OF_PHASE = {"train": "training", "aggregate": "training", "evaluate": "evaluation"}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartBench:
    """What is measured."""

    app: Path
    config: RunConfig  # of the app, with what is overridden
    run_config: tuple[str, ...] = ()  # the overrides, as the command takes them
    local: bool = False  # flower-split run --local
    repeats: int = 1
    num_threads: int = 0  # of plain PEFT; 0: every core


def measure_quickstart(bench: QuickstartBench) -> Figures:
    """Run both in turns.

    Raises:
        ConfigError: The run is not one that plain PEFT has an equal of.
        FederationError: One of them failed.
    """
    _check(bench.config)
    threads = bench.num_threads or len(os.sched_getaffinity(0))
    ours: list[Mapping[str, float]] = []
    plain: list[Mapping[str, float]] = []
    for _ in range(bench.repeats):
        plain.append(_plain(bench.config, threads))
        ours.append(_ours(bench))
    name = f"{OURS}{' --local' if bench.local else ''}"
    reference = f"{PLAIN}, {threads} thread{'s' * (threads > 1)}"
    return Figures(
        name="quickstart",
        title=f"{bench.app.name}: {bench.config.num_clients} clients, {plain[0]['tokens']:.0f} label "
        "tokens trained, beside plain PEFT on the same",
        machine=describe_machine(),
        settings={
            "app": str(bench.app),
            "run-config": list(bench.run_config),
            "local": bench.local,
            "repeats": bench.repeats,
            "threads": threads,
        },
        rows=[*_rows(reference, reference, plain), *_rows(name, reference, ours)],
    )


def _check(config: RunConfig) -> None:
    if config.model.task != CAUSAL_LM or not config.train.local_steps:
        raise ConfigError(
            "bench quickstart measures causal language modelling by steps; this app has model.task "
            f'"{config.model.task}" and train.local-steps {config.train.local_steps}. Set them in '
            "--run-config, or name another app."
        )
    if config.fraction_train < 1 or config.strategy.name == "fedbuff":
        raise ConfigError(
            "plain PEFT takes the batches of all clients in every round. Set fraction-train = 1.0 and "
            "a strategy that works in rounds."
        )


def _rows(name: str, reference: str, found: Sequence[Mapping[str, float]]) -> list[Row]:
    """Return the row of the whole, then those of the phases that took any time."""
    rows = [
        Row(
            what=name,
            seconds=tuple(one["all"] for one in found),
            base=reference,
            beside={"perplexity": found[-1]["perplexity"]},
        )
    ]
    for phase in PHASES:
        seconds = tuple(one.get(phase, 0.0) for one in found)
        if max(seconds) > 0:
            has_base = phase in ("start", "training", "evaluation")
            rows.append(
                Row(
                    what=f"{name}: {phase}",
                    seconds=seconds,
                    base=f"{reference}: {phase}" if has_base else "",
                )
            )
    return rows


def _plain(config: RunConfig, threads: int) -> dict[str, float]:
    """Return the seconds of plain PEFT by phase."""
    rounds = range(1, config.num_server_rounds + 1)
    seeds = [
        [stable_seed(config.seed, slot, server_round) for server_round in rounds]
        for slot in range(config.num_clients)
    ]
    began = time.time()
    order = {
        "config": resolved_run_config(config),
        "seeds": seeds,
        "began": began,
        "num_threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "flower_split.bench.plain_peft"],
        input=json.dumps(order) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FederationError(f"{PLAIN} ended with {done.returncode}; its own messages say why.")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "all": time.time() - began, "perplexity": math.exp(found["held-out loss"])}


def _ours(bench: QuickstartBench) -> dict[str, float]:
    """Return the seconds of the command by phase."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "-m", "flower_split.cli.main", "run", str(bench.app)]
        command += ["--local"] if bench.local else []
        for values in (*bench.run_config, f'run-dir="{directory}"'):
            command += ["--run-config", values]
        began = time.time()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        ended = time.time()
        if done.returncode:
            raise FederationError(
                f"{OURS} ended with {done.returncode}; run it by itself to see why: "
                f"{' '.join(command[3:])}"
            )
        records = read_metrics(directory / FILE)
    losses = [record.get("eval_loss") for record in records if record.get("kind") == "round"]
    last = next((loss for loss in reversed(losses) if isinstance(loss, float)), float("nan"))
    return {**phases(records, began, ended), "all": ended - began, "perplexity": math.exp(last)}


def phases(records: Sequence[Mapping[str, Json]], began: float, ended: float) -> dict[str, float]:
    """Return the seconds of a run's phases; together they are all of it.

    The time between two records belongs to what the later one is of; that after the last is the end.

    Args:
        records: Of the run's ``metrics.jsonl``, in order.
        began: When the command was started, in seconds since the epoch.
        ended: When it had ended.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    before, phase = began, "start"
    for record in records:
        now = datetime.fromisoformat(str(record["time"])).timestamp()
        phase = _phase_of(record, phase)
        seconds[phase] += max(0.0, now - before)
        before = max(before, now)
    seconds["end"] += max(0.0, ended - before)
    return seconds


def _phase_of(record: Mapping[str, Json], running: str) -> str:
    """Return what a record is of; one that closes a round is of what was running."""
    if record.get("phase") == "baseline":
        return "baseline"
    kind, phase = str(record.get("kind")), str(record.get("phase"))
    return _OF_KIND.get(kind) or _OF_PHASE.get(phase) or running
