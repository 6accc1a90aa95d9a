"""A sweep's results: one row for each run, and over seeds one for each variant.

Every perplexity is that of all clients' held-out tokens together. Deviations are of the sample
(n − 1). A variant is compared with the first one seed by seed, as both see the same data and the
same initial values: ``p`` is that of a paired t-test, two-sided, on the held-out loss, whose
differences are as good as symmetric where those of perplexities are not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flower_split.errors import ConfigError
from flower_split.experiments.grid import Axes, Cell
from flower_split.runs.files import Json, read_json

if TYPE_CHECKING:
    import pandas

_TRUNK = ("activations_up", "activations_down", "gradients_up", "gradients_down")
_ADAPTERS = ("adapters_up", "adapters_down")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What training asks of the machines, by the model's configuration: of one client, and of the trunk."""

    client_bytes: int  # at its peak, beside what Python and its libraries take
    client_flops: int  # floating-point operations of an optimizer step
    trunk_bytes: int  # 0: there is no trunk
    trunk_flops: int  # for one client's optimizer step
    wire_bytes: int = (
        0  # to and from the trunk in the whole run, all clients, as planned; 0: none, or unknown
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What one finished run came to."""

    cell: Cell
    num_tokens: int  # held-out label tokens
    base: float  # perplexity before training
    perplexity: float
    by_client: Mapping[str, float]  # client -> perplexity
    trained_tokens: int
    trunk_bytes: int  # of training, both ways, all clients
    adapter_bytes: int  # to and from the ServerApp, all clients
    seconds: float  # of the whole run
    demand: Demand | None = None  # None: nobody has worked it out

    @property
    def loss(self) -> float:
        """Return the held-out loss, in nats per token."""
        return math.log(self.perplexity)


def read_result(cell: Cell, directory: Path) -> RunResult:
    """Read a finished run's outcome from its ``summary.json``.

    Raises:
        RunDirectoryError: The file is missing or damaged.
        ConfigError: The run evaluated nothing.
    """
    summary = read_json(directory / "summary.json")
    overall, facts = _mapping(summary["overall"]), _mapping(summary["facts"])
    if not overall:
        raise ConfigError(
            f"the run in {directory} evaluated nothing, so it cannot be compared. Run the sweep with "
            "fraction-evaluate above 0."
        )
    counted = _mapping(_mapping(summary["bytes"]).get("all"))
    clients = summary["clients"]
    rows = [_mapping(row) for row in clients] if isinstance(clients, Sequence) else []
    return RunResult(
        cell=cell,
        num_tokens=int(_number(overall["num_tokens"])),
        base=_number(overall["base"]),
        perplexity=_number(overall["federated"]),
        by_client={str(row["client"]): _number(row["federated"]) for row in rows},
        trained_tokens=int(_number(facts["label tokens trained"])),
        trunk_bytes=int(sum(_number(counted.get(name, 0)) for name in _TRUNK)),
        adapter_bytes=int(sum(_number(counted.get(name, 0)) for name in _ADAPTERS)),
        seconds=_number(facts.get("seconds")),
    )


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Json) -> float:
    """Return a number; NaN where JSON has null for one that is not finite."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def by_run(results: Sequence[RunResult]) -> "pandas.DataFrame":
    """Return one row for each run, as ``results.csv`` has them."""
    import pandas  # heavy, and of the extra "experiments"

    rows = []
    for result in results:
        rows.append(
            {
                "run": result.cell.name,
                "baseline": result.cell.baseline,
                **dict(result.cell.values),
                "held_out_tokens": result.num_tokens,
                "base_perplexity": result.base,
                "perplexity": result.perplexity,
                "held_out_loss": result.loss,
                **{f"perplexity of {name}": value for name, value in result.by_client.items()},
                "trained_tokens": result.trained_tokens,
                "trunk_bytes": result.trunk_bytes,
                "adapter_bytes": result.adapter_bytes,
                "seconds": result.seconds,
                **({} if result.demand is None else asdict(result.demand)),
            }
        )
    return pandas.DataFrame(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantResult:
    """What a variant came to, over seeds."""

    name: str
    perplexities: Sequence[float]  # by seed
    mean: float
    deviation: float  # NaN for one seed
    change: float  # of the first variant's perplexity, mean over the seeds that both have; in %
    change_deviation: float  # NaN for one seed
    p: float  # NaN for the first variant, and for one seed
    trunk_bytes: float  # mean
    adapter_bytes: float  # mean
    seconds: float  # mean
    demand: Demand | None  # the same for every seed


def by_variant(results: Sequence[RunResult], axes: Axes) -> list[VariantResult]:
    """Return one row for each variant, in the order of ``results``; the first is the reference."""
    groups: dict[tuple[str, object], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.cell.baseline, result.cell.variant), []).append(result)
    first = next(iter(groups.values()), [])
    return [_variant(group, first, axes) for group in groups.values()]


def _variant(group: Sequence[RunResult], first: Sequence[RunResult], axes: Axes) -> VariantResult:
    mine = {result.cell.seed: result for result in group}
    others = {result.cell.seed: result for result in first}
    both = [] if group is first else [seed for seed in mine if seed in others]
    changes = [100 * (mine[seed].perplexity / others[seed].perplexity - 1) for seed in both]
    perplexities = [result.perplexity for result in group]
    return VariantResult(
        name=name_of(group[0].cell, axes),
        perplexities=perplexities,
        mean=mean_of(perplexities),
        deviation=deviation_of(perplexities),
        change=mean_of(changes),
        change_deviation=deviation_of(changes),
        p=_paired_p([mine[s].loss for s in both], [others[s].loss for s in both]),
        trunk_bytes=mean_of([result.trunk_bytes for result in group]),
        adapter_bytes=mean_of([result.adapter_bytes for result in group]),
        seconds=mean_of([result.seconds for result in group]),
        demand=group[0].demand,
    )


def name_of(cell: Cell, axes: Axes) -> str:
    """Return a variant's name: its baseline, and its values of the keys that vary."""
    shown = [
        f"{value}" if key == "mode" else f"{key.rpartition('.')[2]} {value}"
        for key, value in cell.variant
        if key not in axes or len(axes[key]) > 1
    ]
    return ", ".join([*([cell.baseline] if cell.baseline else []), *shown]) or "the run"


def mean_of(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation_of(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = mean_of(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _paired_p(mine: Sequence[float], others: Sequence[float]) -> float:
    if len(mine) < 2:
        return math.nan
    if all(a == b for a, b in zip(mine, others, strict=True)):
        return 1.0  # the test divides by a deviation of 0
    from scipy.stats import ttest_rel

    return float(ttest_rel(mine, others).pvalue)
