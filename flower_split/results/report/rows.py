"""What the charts and tables of a report show: rows, made of ``metrics.jsonl`` and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.config import Scalar, resolved_run_config
from flower_split.runs.files import Json, read_config, read_json
from flower_split.runs.metrics import BYTE_KINDS, FILE, read_metrics
from flower_split.runs.samples import Sample, read_samples

Row = Mapping[str, Json]

PARTS = {
    "compute_seconds": "client computes",
    "wire_seconds": "wire",
    "trunk_seconds": "trunk computes",
    "wait_seconds": "client waits",
}
"""Measure of a step -> what the time-line calls it, in the order in which it shows them."""

MAX_TIMELINE_ROUNDS = 24  # of one run; the page must stay small


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """One run, as read from its directory."""

    name: str
    path: Path
    config: Mapping[str, Scalar]
    summary: Mapping[str, Json]  # empty: it has not finished
    versions: Mapping[str, Json]
    records: Sequence[Row]  # the lines of metrics.jsonl
    samples: Sequence[Sample] = ()  # how it continues prompts, where somebody asked

    def of(self, kind: str) -> list[Row]:
        """Return the lines of one kind."""
        return [record for record in self.records if record.get("kind") == kind]

    @property
    def clients(self) -> Mapping[int, str]:
        """Return what every client is called: its partition, and what its data is about."""
        names = {number(r, "partition_id"): str(r.get("name", "")) for r in self.of("data")}
        for record in self.of("evaluation"):
            names.setdefault(number(record, "partition_id"), "")
        return {slot: f"{slot} {name}".rstrip() for slot, name in sorted(names.items())}


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read run directories; a run that goes on is shown as far as it is.

    Raises:
        RunDirectoryError: One is no run directory, or a file is damaged; names it.
    """
    absolute = [path.expanduser().absolute() for path in paths]
    names = [path.name for path in absolute]
    runs = []
    for path in absolute:
        config, unique = resolved_run_config(read_config(path)), names.count(path.name) == 1
        runs.append(
            RunData(
                name=path.name if unique else f"{path.parent.name}/{path.name}",
                path=path,
                config=config,
                summary=read_json(path / "summary.json") if _finished(path) else {},
                versions=read_json(path / "versions.json"),
                records=read_metrics(path / FILE),
                samples=read_samples(path),
            )
        )
    return runs


def _finished(path: Path) -> bool:
    return (path / "summary.json").is_file()


def number(record: Row, name: str) -> int:
    """Return a whole number of a record; -1 where it has none."""
    value = record.get(name)
    return value if isinstance(value, int) else -1


def seconds(record: Row, name: str) -> float:
    """Return a measured time; 0 where nothing was measured."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def rounds(run: RunData) -> list[dict[str, Json]]:
    """Return one row for each round."""
    names = ("train_loss", "eval_loss", "perplexity", "seconds", "num_tokens")
    return [
        {"run": run.name, "round": record["server_round"]} | _some(record, names)
        for record in run.of("round")
    ]


def evaluations(run: RunData) -> list[dict[str, Json]]:
    """Return one row for each client's evaluation of the federated model."""
    return [
        {"run": run.name, "client": run.clients[number(record, "partition_id")]}
        | {"round": record["server_round"], "perplexity": record.get("perplexity")}
        for record in run.of("evaluation")
        if not record.get("local_only")
    ]


def steps(run: RunData) -> list[dict[str, Json]]:
    """Return one row for each local step: its loss, and its place among all of the client's."""
    taken: dict[int, int] = {}
    rows: list[dict[str, Json]] = []
    for record in run.of("step"):
        slot = number(record, "partition_id")
        taken[slot] = taken.get(slot, 0) + 1
        row: dict[str, Json] = {"run": run.name, "client": _client(run, slot), "step": taken[slot]}
        rows.append({**row, "round": record["server_round"], "loss": record.get("loss")})
    return rows


def timeline(run: RunData) -> list[dict[str, Json]]:
    """Return where the time of every step went, one row for each part of it.

    A step's measured times are laid end to end, from the beginning of the client's round: how much
    there was of each is measured, their order within one step is not.
    """
    shown = set(timeline_rounds(run))
    at: dict[tuple[int, int], float] = {}
    rows: list[dict[str, Json]] = []
    for record in run.of("step"):
        place = number(record, "server_round"), number(record, "partition_id")
        if place[0] not in shown:
            continue
        for measure, part in PARTS.items():
            start = at.get(place, 0.0)
            at[place] = start + seconds(record, measure)
            if at[place] > start:
                row: dict[str, Json] = {"run": run.name, "round": place[0], "part": part}
                row |= {"client": _client(run, place[1]), "step": record["step"]}
                rows.append({**row, "start": round(start, 6), "end": round(at[place], 6)})
    return rows


def timeline_rounds(run: RunData) -> list[int]:
    """Return the rounds that the time-line shows: all, or some from first to last."""
    there = sorted({number(record, "server_round") for record in run.of("step")})
    if len(there) <= MAX_TIMELINE_ROUNDS:
        return there
    last = len(there) - 1
    chosen = {round(i * last / (MAX_TIMELINE_ROUNDS - 1)) for i in range(MAX_TIMELINE_ROUNDS)}
    return [there[index] for index in sorted(chosen)]


def shares(run: RunData) -> list[dict[str, Json]]:
    """Return how much time each part of the steps took, over the whole run, by client."""
    totals: dict[tuple[int, str], float] = {}
    for record in run.of("step"):
        for measure, part in PARTS.items():
            key = number(record, "partition_id"), part
            totals[key] = totals.get(key, 0.0) + seconds(record, measure)
    return [
        {"run": run.name, "client": _client(run, slot), "part": part, "seconds": round(value, 6)}
        for (slot, part), value in totals.items()
    ]


def sent(run: RunData) -> list[dict[str, Json]]:
    """Return the bytes of each client by kind and direction, over the whole run."""
    totals: dict[tuple[int, str], int] = {}
    for record in run.of("bytes"):
        for name in BYTE_KINDS:
            if number(record, name) > 0:
                key = number(record, "partition_id"), name
                totals[key] = totals.get(key, 0) + number(record, name)
    return [
        {"run": run.name, "client": _client(run, slot), "kind": name, "bytes": value}
        for (slot, name), value in totals.items()
    ]


def memory(run: RunData) -> list[dict[str, Json]]:
    """Return the trunk's saved activations in each round, and the time that it computed."""
    names = ("activation_peak_bytes", "activation_budget_bytes", "compute_seconds")
    return [
        {"run": run.name, "round": record["server_round"]} | _some(record, names)
        for record in run.of("trunk")
    ]


def participation(run: RunData) -> list[dict[str, Json]]:
    """Return what became of every client's work in each round, with the reason where it was lost."""
    states: dict[tuple[int, int], tuple[str, str]] = {}
    for record in run.of("step"):
        states[number(record, "server_round"), number(record, "partition_id")] = ("trained", "")
    for kind, field, state in (
        ("trunk", "left_out", "left out by the trunk"),
        ("aggregation", "excluded", "adapter excluded"),
    ):
        for record in run.of(kind):
            whose = record.get(field)
            for slot, why in whose.items() if isinstance(whose, Mapping) else ():
                states[number(record, "server_round"), int(slot)] = (state, str(why))
    rows: list[dict[str, Json]] = []
    for place, (became, reason) in sorted(states.items()):
        row: dict[str, Json] = {"run": run.name, "round": place[0], "state": became, "why": reason}
        rows.append({**row, "client": _client(run, place[1])})
    return rows


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs: key, and its value in each."""
    keys = sorted({key for run in runs for key in run.config} - {"run-dir", "resume"})
    found = []
    for key in keys:
        values = [repr(run.config.get(key)) for run in runs]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _client(run: RunData, slot: int) -> str:
    return run.clients.get(slot, str(slot))


def _some(record: Row, names: Sequence[str]) -> dict[str, Json]:
    return {name: record[name] for name in names if name in record}
