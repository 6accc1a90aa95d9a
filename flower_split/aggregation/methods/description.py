"""Say of each method which paper it is and what it does otherwise; printed beside any ranking."""

from collections.abc import Iterable
from dataclasses import dataclass

from flower_split.aggregation.core.method import Aggregator
from flower_split.aggregation.core.server_optimizer import ADAPTIVE

SERVER_NOTE = (
    f"server-optimizer {', '.join(ADAPTIVE)}: Algorithm 2 of arXiv 2003.00295 on every entry of ΔW, "
    "with dense moments of 8 bytes an entry; ΔW is recompressed to max-rank after the step."
)


@dataclass(frozen=True, slots=True)
class MethodDescription:
    """What a reader must know before comparing a method with its paper.

    Args:
        name: As ``strategy.aggregator`` names it.
        paper: Number on arXiv; empty: this package's own.
        exactness: How the merged update relates to Σ w ΔW.
        deviation: What it does otherwise than the paper; empty: nothing.
    """

    name: str
    paper: str
    exactness: str
    deviation: str


def describe(method: type[Aggregator]) -> MethodDescription:
    """Return a method's description."""
    return MethodDescription(method.name, method.paper, method.exactness, method.deviation)


def method_table(methods: Iterable[type[Aggregator]]) -> str:
    """Return a Markdown table of the methods, their papers and their deviations."""
    lines = ["| method | paper | merged update | differs from the paper |", "|---|---|---|---|"]
    for one in map(describe, methods):
        paper = f"arXiv {one.paper}" if one.paper else "this package"
        lines.append(f"| `{one.name}` | {paper} | {one.exactness} | {one.deviation or '–'} |")
    return "\n".join([*lines, "", SERVER_NOTE])
