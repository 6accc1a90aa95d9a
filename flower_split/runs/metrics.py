"""``metrics.jsonl``: one JSON object per line, by a documented schema.

Every line has :data:`COMMON`; its ``kind`` says what else (:data:`SCHEMA`). Names are in snake_case,
numbers are in the units given, what was not measured is left out, NaN and infinities are null.
Lines of former versions, in kebab-case, are read under today's names.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from flower_split.errors import RunDirectoryError
from flower_split.runs.files import Json, finite
from flower_split.runtime.atomic_files import write_atomically
from flower_split.runtime.json_text import read_json_text

FILE = "metrics.jsonl"
PHASES = ("train", "evaluate", "aggregate", "baseline", "round")

COMMON: Mapping[str, str] = {
    "kind": "which fields the line has: a key of SCHEMA",
    "phase": "what the run was doing: train, evaluate, aggregate, baseline or round",
    "server_round": "from 1; 0: before the first. Of a baseline: the run's last",
    "time": "UTC, ISO 8601, when the line was written",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of line."""

    about: str
    phase: str  # where the line names none itself
    fields: Mapping[str, str]


_WIRE = {
    "bytes_sent": "bytes, client to trunk, in frames",
    "bytes_received": "bytes, trunk to client, in frames",
}

_SCORES = {
    "accuracy": "share of labels that are right, where the task has it",
    "f1": "of classes (macro), or of answers, where the task has it",
    "exact_match": "share of records that are right as a whole, where the task has it",
    "text_exact_match": "share of generated texts that are right (evaluation.text-scores)",
    "rouge1": "F1 of generated texts' words, mean over records",
    "rouge2": "F1 of their pairs of words",
    "rouge_l": "F1 of their longest common subsequence of words",
    "bleu": "of all generated texts together, 0 to 100",
}

_PERSONAL = {
    f"personal_{name}": "of each client's own model, before averaging (evaluation.personalised)"
    for name in ("perplexity", *_SCORES)
}

SCHEMA: Mapping[str, Kind] = {
    "step": Kind(
        "one local optimizer step of one client",
        "train",
        {
            "partition_id": "whose",
            "step": "from 0, within the round",
            "loss": "nats per label token, of the step's batch",
            "num_tokens": "label tokens",
            "learning_rate": "the client's, of this step",
            "grad_norm": "L2 norm of the client's gradient before clipping",
            "compute_seconds": "on the client",
            "wait_seconds": "at the trunk, for its processor and the other clients",
            "trunk_seconds": "the trunk's computing",
            "wire_seconds": "the rest of the calls",
            **_WIRE,
        },
    ),
    "evaluation": Kind(
        "one model's result on one client's held-out data",
        "evaluate",
        {
            "partition_id": "whose data",
            "loss_sum": "nats, over all label tokens",
            "num_tokens": "held-out label tokens",
            "num_examples": "held-out examples",
            "eval_loss": "nats per label token",
            "perplexity": "exp(eval_loss)",
            **_SCORES,
            "sums": "what the scores are made of: they add up over clients",
            **_PERSONAL,
            "personal_sums": "loss sum and sums of the client's own model",
            "local_only": "true: of a model that one client trained alone (phase baseline)",
            "trained_by": "with local_only: the client that trained it",
            **_WIRE,
        },
    ),
    "round": Kind(
        "one server round, over all clients",
        "round",
        {
            "seconds": "training and evaluation",
            "train_loss": "nats per label token",
            "num_tokens": "label tokens trained",
            "eval_loss": "nats per held-out label token of the clients in evaluated",
            "perplexity": "exp(eval_loss)",
            **_SCORES,
            **_PERSONAL,
            "evaluated": "partitions whose held-out data is in eval_loss",
            **_WIRE,
        },
    ),
    "trunk": Kind(
        "the trunk's part of one server round",
        "train",
        {
            "attempt": "from 0; counts rounds that were tried again",
            "version": "of the trunk's weights after the round",
            "optimizer_steps": "of the trunk",
            "compute_seconds": "of the trunk",
            "activation_peak_bytes": "bytes of saved activations",
            "activation_budget_bytes": "bytes",
            "activation_recomputes": "forwards computed twice to save memory",
            "activation_refusals": "forwards refused for lack of memory",
            "batches": "joint batches of the clients' micro-batches (trunk.window-batches)",
            "partial_batches": "of them, without somebody who had planned them",
            "sums_again": "windows summed again without a client that had contributed",
            "left_out": "partition -> why its contributions did not count",
        },
    ),
    "aggregation": Kind(
        "the clients' adapters became the next one",
        "aggregate",
        {
            "clients": "partitions that are in it",
            "excluded": "partition -> why it is not",
            "unchanged_modules": "modules that no update changed",
            "truncation": "share of ΔW beyond the adapter's rank",
            "seconds": "of aggregation",
        },
    ),
    "central": Kind(
        "what the app's own evaluate_fn measured in the ServerApp",
        "evaluate",
        {
            "metrics": "name -> value, as evaluate_fn returned them",
            "seconds": "that it took",
        },
    ),
    "arrival": Kind(
        "one reply to an asynchronous run",
        "train",
        {
            "partition_id": "whose",
            "dispatch": "which of the run's dispatches",
            "order": "in the buffer, from 0",
            "staleness": "versions that it was late",
            "dropped": "why it was not used",
        },
    ),
    "bytes": Kind(
        "what one client sent and received since its line before, by kind",
        "round",
        {
            "partition_id": "whose",
            "activations_up": "bytes to the trunk, forwards of training",
            "activations_down": "bytes from the trunk, forwards of training",
            "gradients_up": "bytes to the trunk, backwards",
            "gradients_down": "bytes from the trunk, backwards",
            "evaluation_up": "bytes to the trunk, evaluation",
            "evaluation_down": "bytes from the trunk, evaluation",
            "adapters_up": "bytes to the ServerApp: trained adapters and metrics",
            "adapters_down": "bytes from the ServerApp: the global adapter",
            "baseline_up": "bytes to the ServerApp, for local-only-baseline",
            "baseline_down": "bytes from the ServerApp, for local-only-baseline",
        },
    ),
    "data": Kind(
        "one client's data, as it reported it before round 1",
        "train",
        {
            "partition_id": "whose",
            "name": "what the data is about",
            "num_examples": "training examples",
            "num_eval_examples": "held-out examples",
            "planned_steps": "local optimizer steps per round",
        },
    ),
}
"""Kind of line -> its fields."""

BYTE_KINDS = tuple(name for name in SCHEMA["bytes"].fields if name.endswith(("_up", "_down")))
"""The counts of a line of kind "bytes", in the order of tables."""


def append_metric(path: Path, kind: str, record: Mapping[str, Json]) -> dict[str, Json]:
    """Append one record to the file ``path`` and flush; return it with phase, round and time.

    A torn last line, left by a process that died while writing, is cut off first.

    Raises:
        RunDirectoryError: ``kind`` is none of :data:`SCHEMA`, or the record has no server round.
    """
    if kind not in SCHEMA:
        raise RunDirectoryError(
            f"a metric's kind must be one of {', '.join(SCHEMA)}; it is {kind!r}."
        )
    line = {
        "kind": kind,
        "phase": SCHEMA[kind].phase,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **_snake_case(record),
    }
    if not isinstance(line.get("server_round"), int):
        raise RunDirectoryError(
            f"every line of {FILE} must have an integer server_round; a record of kind {kind!r} has "
            f"{line.get('server_round')!r}."
        )
    with open(path, "ab+") as file:
        if file.tell() and not _ends_with_newline(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_as_line(line))
        file.flush()
    return {name: finite(value) for name, value in line.items()}


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Json]]:
    """Return the records so far, of one kind or all, less a torn last line; none without a file.

    Raises:
        RunDirectoryError: A complete line is no JSON object; names the line.
    """
    if not path.exists():
        return []
    records: list[dict[str, Json]] = []
    complete = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(complete, start=1):
        try:
            record = read_json_text(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RunDirectoryError(
                f"{path}, line {number}: every line must be a JSON object; this one is not. "
                "Remove the line, or restore the file."
            )
        if kind is None or record.get("kind") == kind:
            records.append(_snake_case(record))
    return records


def write_metrics(path: Path, records: Sequence[Mapping[str, Json]]) -> None:
    """Write the file ``path`` anew, with ``records`` as :func:`read_metrics` gave them."""
    if records or path.exists():
        write_atomically(path, b"".join(_as_line(record) for record in records))


def _snake_case(record: Mapping[str, Json]) -> dict[str, Json]:
    return {key.replace("-", "_"): value for key, value in record.items()}


def _as_line(record: Mapping[str, Json]) -> bytes:
    return (json.dumps(finite(record), allow_nan=False) + "\n").encode()


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
