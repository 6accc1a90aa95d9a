"""Three ways to compare runs by what they cost, from the curves in their ``metrics.jsonl``.

They are those of EdgeFlowerTune (Geng et al., arXiv 2605.08636, 2026): the quality that a budget buys, the
cost of a quality that is wanted, and what is lost under harder conditions. A curve has a point for each
round that was evaluated, with all that was spent until then: bytes of training to and from the trunk and of
adapters, of all clients; seconds; and label tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.experiments.grid import SEED, Axes, Cell
from flower_split.experiments.results import RunResult, deviation_of, mean_of, name_of
from flower_split.runs.metrics import BYTE_KINDS, FILE, read_metrics
from flower_split.runs.summary import markdown_table
from flower_split.runtime.atomic_files import write_atomically

_COUNTED = tuple(
    kind for kind in BYTE_KINDS if kind.startswith(("activations", "gradients", "adapters"))
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What a run had come to after a round that was evaluated, and what it had spent."""

    server_round: int
    perplexity: float  # of all clients' held-out tokens
    num_bytes: float
    seconds: float
    tokens: float  # label tokens trained on


Curve = Sequence[Point]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is asked of the curves; 0 or empty: nothing."""

    megabytes: float = 0.0  # a budget of bytes, in 10⁶
    seconds: float = 0.0  # a budget of time
    perplexity: float = 0.0  # a target
    harder: str = ""  # the key whose first value is the easy condition, and whose others are harder

    def __post_init__(self) -> None:
        """Check that no number is negative."""
        for name in ("megabytes", "seconds", "perplexity"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"a budget or target must be at least 0; {name} is {getattr(self, name):g}."
                )

    @property
    def asked(self) -> bool:
        """Whether there is anything to work out."""
        return bool(self.megabytes or self.seconds or self.perplexity or self.harder)

    def check(self, axes: Axes) -> None:
        """Check that the key of harder conditions is one of the grid's, with several values.

        Raises:
            ConfigError: It is not.
        """
        if self.harder and (self.harder == SEED or len(axes.get(self.harder, ())) < 2):
            raise ConfigError(
                f"--robust-over must name a key of the grid with several values, the easy one first; "
                f"{self.harder!r} is none. The grid has {', '.join(axes)}."
            )


def read_curve(directory: Path, uncounted_bytes: float = 0.0) -> list[Point]:
    """Read a run's curve, round 0 first where it was evaluated.

    Args:
        directory: The run's.
        uncounted_bytes: What all rounds together send beside what was counted: a baseline whose parties
            are in one process counts none of their calls.
    """
    spent = {"num_bytes": 0.0, "seconds": 0.0, "tokens": 0.0}
    by_round: dict[int, float] = {}
    records = read_metrics(directory / FILE)
    last = max(
        (int(_number(r["server_round"])) for r in records if r["kind"] == "round"), default=0
    )
    each = uncounted_bytes / max(last, 1)
    for record in records:
        if record["kind"] == "bytes":
            number = int(_number(record["server_round"]))
            count = sum(_number(record.get(kind)) for kind in _COUNTED)
            by_round[number] = by_round.get(number, 0.0) + count
    points = []
    for record in sorted(
        (r for r in records if r["kind"] == "round"), key=lambda r: _number(r["server_round"])
    ):
        number = int(_number(record["server_round"]))
        spent["num_bytes"] += by_round.get(number, 0.0) + (each if number else 0.0)
        spent["seconds"] += _number(record.get("seconds"))
        spent["tokens"] += _number(record.get("num_tokens"))
        if "perplexity" in record:
            value = record["perplexity"]
            perplexity = math.inf if value is None else _number(value)
            points.append(Point(server_round=number, perplexity=perplexity, **spent))
    return points


def quality_within(curve: Curve, *, num_bytes: float = 0.0, seconds: float = 0.0) -> Point | None:
    """Return the last point that a budget allows; None: it does not even pay for the first.

    It is the last and not the best: whoever spends the budget does not know the held-out data.

    Args:
        curve: A run's.
        num_bytes: The budget; 0: any.
        seconds: The budget; 0: any.
    """
    paid = [
        point
        for point in curve
        if (not num_bytes or point.num_bytes <= num_bytes)
        and (not seconds or point.seconds <= seconds)
    ]
    return paid[-1] if paid else None


def cost_to(curve: Curve, perplexity: float) -> Point | None:
    """Return the first point at a target or below; None: the run never got there."""
    return next((point for point in curve if point.perplexity <= perplexity), None)


def loss_under(
    results: Sequence[RunResult], axes: Axes, key: str
) -> dict[str, Mapping[object, list[float]]]:
    """Return what harder conditions cost: variant -> value of ``key`` -> change by seed, in %.

    The change is of the final perplexity against that of the same variant and seed at the key's first
    value. A baseline that has no values of ``key`` is left out.
    """
    easy, *harder = axes[key]
    by_cell = {result.cell: result.perplexity for result in results}
    found: dict[str, dict[object, list[float]]] = {}
    for result in results:
        values = dict(result.cell.values)
        if key not in values or values[key] != easy:
            continue
        without = Cell(
            tuple(pair for pair in result.cell.values if pair[0] not in (key, SEED)),
            result.cell.baseline,
        )
        row = found.setdefault(name_of(without, axes), {value: [] for value in harder})
        for value in harder:
            other = Cell(
                tuple((k, value if k == key else v) for k, v in result.cell.values),
                result.cell.baseline,
            )
            if other in by_cell:
                row[value].append(100 * (by_cell[other] / result.perplexity - 1))
    return dict(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One run with its curve."""

    result: RunResult
    curve: Curve


def write_protocols(
    out: Path,
    results: Sequence[RunResult],
    folders: Mapping[Cell, Path],
    axes: Axes,
    limits: Limits,
) -> str:
    """Write ``protocols.md`` into the sweep's directory, and return it: a table for each question.

    Args:
        out: The sweep's directory.
        results: Of its finished runs.
        folders: Their run directories.
        axes: The grid.
        limits: What is asked.
    """
    runs = []
    for result in results:
        planned = 0 if result.trunk_bytes or result.demand is None else result.demand.wire_bytes
        curve = read_curve(folders[result.cell], planned)
        runs.append(Compared(result=result, curve=curve))
    tables = protocol_tables(runs, axes, limits)
    text = "\n\n".join(f"{title}\n\n{markdown_table(cells)}" for title, cells in tables.items())
    write_atomically(out / "protocols.md", (text + "\n").encode())
    return text


def protocol_tables(
    runs: Sequence[Compared], axes: Axes, limits: Limits
) -> dict[str, list[list[str]]]:
    """Return the tables that are asked for: title -> header and rows, a row for each variant."""
    groups: dict[str, list[Compared]] = {}
    for run in runs:
        groups.setdefault(name_of(run.result.cell, axes), []).append(run)
    tables = {}
    if limits.megabytes or limits.seconds:
        budget = " and ".join(
            [
                *([f"{limits.megabytes:g} MB"] if limits.megabytes else []),
                *([f"{limits.seconds:g} s"] if limits.seconds else []),
            ]
        )
        tables[f"Quality within {budget}"] = _within(groups, limits)
    if limits.perplexity:
        tables[f"Cost to perplexity {limits.perplexity:g}"] = _to_target(groups, limits.perplexity)
    if limits.harder:
        results = [run.result for run in runs]
        tables[f"Change of perplexity over {limits.harder}"] = _harder(results, axes, limits.harder)
    return tables


def _within(groups: Mapping[str, Sequence[Compared]], limits: Limits) -> list[list[str]]:
    lines = [["variant", "runs", "perplexity", "after round"]]
    for name, runs in groups.items():
        found = [
            quality_within(run.curve, num_bytes=1e6 * limits.megabytes, seconds=limits.seconds)
            for run in runs
        ]
        points = [point for point in found if point is not None]
        lines.append(
            [
                name,
                f"{len(points)} of {len(runs)}",
                _spread([point.perplexity for point in points], ".2f"),
                _spread([point.server_round for point in points], ".1f"),
            ]
        )
    return lines


def _to_target(groups: Mapping[str, Sequence[Compared]], target: float) -> list[list[str]]:
    lines = [["variant", "runs that get there", "rounds", "MB", "s", "tokens"]]
    for name, runs in groups.items():
        found = [cost_to(run.curve, target) for run in runs]
        points = [point for point in found if point is not None]
        counts = any(point.num_bytes for run in runs for point in run.curve)
        lines.append(
            [
                name,
                f"{len(points)} of {len(runs)}",
                _spread([point.server_round for point in points], ".1f"),
                _spread([point.num_bytes / 1e6 for point in points], ".1f") if counts else "–",
                _spread([point.seconds for point in points], ".0f"),
                _spread([point.tokens for point in points], ".0f"),
            ]
        )
    return lines


def _harder(results: Sequence[RunResult], axes: Axes, key: str) -> list[list[str]]:
    values = axes[key][1:]
    lines = [["variant", *(f"{key} {value}, %" for value in values), "worst, %"]]
    for name, changes in loss_under(results, axes, key).items():
        means = [mean_of(changes[value]) for value in values]
        known = [mean for mean in means if not math.isnan(mean)]
        cells = [_spread(changes[value], "+.1f") for value in values]
        lines.append([name, *cells, f"{max(known):+.1f}" if known else "–"])
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    mean, deviation = mean_of(values), deviation_of(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:{form}}" + (
        "" if math.isnan(deviation) else f" ± {deviation:{form.lstrip('+')}}"
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
