"""What a benchmark measured: as a table, as JSON, and as a figure.

Ratios are between rows of one run: a machine's load changes from run to run by more than what is
looked for.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flower_split.errors import ConfigError
from flower_split.runtime.atomic_files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was timed.

    Args:
        what: Names it; unique in its benchmark.
        seconds: Of every repetition that counts; at least one.
        base: The row that it is compared with; empty: none.
        beside: More figures, by column.
    """

    what: str
    seconds: tuple[float, ...]
    base: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The rows of one benchmark.

    Args:
        name: Of the benchmark.
        title: What was done, in one line.
        machine: As :func:`flower_split.bench.machine.describe_machine` says.
        settings: Of the command line.
        rows: In their order.
    """

    name: str
    title: str
    machine: Mapping[str, str]
    settings: Mapping[str, object]
    rows: Sequence[Row]

    def ratio(self, row: Row) -> float | None:
        """Return a row's median over that of its base; None: it has none."""
        base = next((other for other in self.rows if other.what == row.base), None)
        return None if base is None else row.median / base.median

    @property
    def columns(self) -> list[str]:
        """The names of all figures beside the times, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.beside))

    def table(self) -> Table:
        """Return the table: medians and spreads in milliseconds."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        table = Table(title=self.title, caption=machine)
        for name in ("what", "median ms", "lowest", "highest", "ratio", "to", *self.columns):
            left = name in ("what", "to")
            table.add_column(name, justify="left" if left else "right", no_wrap=left)
        for row in self.rows:
            ratio = self.ratio(row)
            table.add_row(
                row.what,
                *(_ms(value) for value in (row.median, min(row.seconds), max(row.seconds))),
                "" if ratio is None else f"{ratio:.2f}",
                row.base,
                *(f"{row.beside[name]:.4g}" if name in row.beside else "" for name in self.columns),
            )
        return table

    def as_json(self) -> str:
        """Return everything, with every repetition."""
        rows = [
            {
                "what": row.what,
                "median_seconds": row.median,
                "seconds": list(row.seconds),
                "base": row.base,
                "ratio": self.ratio(row),
                **{name: value for name, value in row.beside.items()},
            }
            for row in self.rows
        ]
        found = {
            "benchmark": self.name,
            "title": self.title,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": rows,
        }
        return json.dumps(found, indent=2, default=str) + "\n"

    def tell(self, console: Console, out: Path | None) -> None:
        """Print the table, and write ``NAME.json`` and ``NAME.png`` to ``out`` if it is given.

        Raises:
            ConfigError: The figure's library is not installed; the JSON file is written.
        """
        console.print(self.table())
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{self.name}.json", self.as_json().encode())
        self._draw(out / f"{self.name}.png")
        console.print(f"written: {out / self.name}.json, .png")

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "--out draws a figure with matplotlib, which is not installed. Run: pip install "
                "'flower-split[plot]'"
            ) from error
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        medians = [1e3 * row.median for row in self.rows]
        below = [1e3 * (row.median - min(row.seconds)) for row in self.rows]
        above = [1e3 * (max(row.seconds) - row.median) for row in self.rows]
        axes.barh([row.what for row in self.rows], medians, xerr=[below, above], color="#5b7ea4")
        axes.invert_yaxis()
        axes.set_xlabel("ms (median, lowest to highest)")
        axes.set_title(self.title, fontsize=9)
        figure.savefig(path, dpi=150)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 1 else f"{1e3 * seconds:.0f}"
