"""A report: a line for each round, as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from flower_split.results.report.report import Report
from flower_split.results.report.rows import RunData


class RoundsReport(Report):
    """Run, round and perplexity over all clients; empty where a round was not evaluated."""

    file: ClassVar[str] = "rounds.csv"

    def write(self, runs: Sequence[RunData], out: Path) -> None:
        """See :class:`Report`."""
        with out.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["run", "round", "perplexity"])
            for run in runs:
                for record in run.of("round"):
                    lines.writerow([run.name, record["server_round"], record.get("perplexity")])
