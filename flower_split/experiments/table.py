"""A sweep's table for the terminal, Markdown and LaTeX, and its figure."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.experiments.grid import Axes
from flower_split.experiments.results import Demand, RunResult, VariantResult, by_run, by_variant
from flower_split.runs.summary import markdown_table
from flower_split.runtime.atomic_files import write_atomically

LIBRARIES = ("pandas", "scipy", "matplotlib")
HEADER = (
    "variant", "runs", "perplexity", "change", "p", "MB to and from the trunk", "MB of adapters",
    "client MiB", "client GFLOP", "trunk MiB", "trunk GFLOP", "s",
)  # fmt: skip


def check_libraries() -> None:
    """Check, before anything runs, that the table can be made.

    Raises:
        ConfigError: A library is missing; names the command that installs it.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a sweep's table needs {', '.join(missing)}, which is not installed. Install it: "
            "pip install 'flower-split[experiments]'."
        )


def table_cells(variants: Sequence[VariantResult]) -> list[list[str]]:
    """Return header and rows as text."""
    rows = [list(HEADER)]
    for index, item in enumerate(variants):
        change = (
            "–" if index == 0 else _with_deviation(item.change, item.change_deviation, "+.1f", " %")
        )
        rows.append(
            [
                item.name,
                str(len(item.perplexities)),
                _with_deviation(item.mean, item.deviation, ".2f"),
                change,
                _p(item.p),
                _megabytes(item.trunk_bytes or _planned_bytes(item.demand)),
                _megabytes(item.adapter_bytes),
                *_demand(item.demand),
                f"{item.seconds:.0f}",
            ]
        )
    return rows


def write_results(out: Path, results: Sequence[RunResult], axes: Axes) -> str:
    """Write ``results.csv``, ``table.md``, ``table.tex`` and the figure; return the Markdown table.

    Args:
        out: The sweep's directory.
        results: Of its finished runs, those of the first variant first.
        axes: Its grid.
    """
    write_atomically(out / "results.csv", by_run(results).to_csv(index=False).encode())
    variants = by_variant(results, axes)
    cells = table_cells(variants)
    markdown = markdown_table(cells)
    write_atomically(out / "table.md", (markdown + "\n").encode())
    write_atomically(out / "table.tex", latex_table(cells).encode())
    draw(out, variants)
    return markdown


def latex_table(cells: Sequence[Sequence[str]]) -> str:
    """Return header and rows as a LaTeX table (booktabs), the first column to the left."""
    header, *body = [[_latex(cell) for cell in row] for row in cells]
    columns = "l" + "r" * (len(header) - 1)
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(row) + r" \\" for row in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def draw(out: Path, variants: Sequence[VariantResult]) -> None:
    """Draw every variant's perplexities: mean, deviation, and each run as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(variants)), layout="constrained")
    axes = figure.subplots()
    for row, item in enumerate(variants):
        spread = 0.0 if math.isnan(item.deviation) else item.deviation
        axes.errorbar(item.mean, row, xerr=spread, fmt="|", color="black", capsize=3, markersize=12)
        axes.scatter(item.perplexities, [row] * len(item.perplexities), s=18, alpha=0.7, zorder=3)
    axes.set_yticks(range(len(variants)), [item.name for item in variants])
    axes.invert_yaxis()
    axes.set_xlabel("held-out perplexity (points: runs; bar: mean ± standard deviation)")
    axes.grid(axis="x", alpha=0.3)
    for kind in ("png", "pdf"):
        figure.savefig(
            out / f"figure.{kind}",
            dpi=150,
            metadata={"CreationDate": None} if kind == "pdf" else None,
        )


def _with_deviation(mean: float, deviation: float, form: str, unit: str = "") -> str:
    if math.isnan(mean):
        return "–"
    spread = "" if math.isnan(deviation) else f" ± {deviation:{form.lstrip('+')}}"
    return f"{mean:{form}}{spread}{unit}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _megabytes(value: float) -> str:
    return "–" if not value or math.isnan(value) else f"{value / 1e6:,.1f}"


def _planned_bytes(demand: Demand | None) -> int:
    """Return the bytes of calls that nobody has counted, as those of a baseline in one process."""
    return 0 if demand is None else demand.wire_bytes


def _demand(demand: Demand | None) -> list[str]:
    """Return memory and arithmetic of client and trunk as cells."""
    if demand is None:
        return ["–"] * 4
    cells = []
    for num_bytes, flops in (
        (demand.client_bytes, demand.client_flops),
        (demand.trunk_bytes, demand.trunk_flops),
    ):
        cells += [f"{num_bytes / 2**20:,.0f}" if num_bytes else "–"]
        cells += [f"{flops / 1e9:,.2f}" if flops else "–"]
    return cells


def _latex(text: str) -> str:
    for plain, written in (
        ("\\", r"\textbackslash{}"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("&", r"\&"),
        ("#", r"\#"),
    ):
        text = text.replace(plain, written)
    return text.replace("±", r"$\pm$").replace("–", "--").replace("< 0", "$<$ 0")
