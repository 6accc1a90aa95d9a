"""A run's summary: held-out perplexity per client before, after, and against training alone.

Losses are in nats per label token; a perplexity is the exponential of such a mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flower_split.config import ModelConfig
from flower_split.errors import FederationError
from flower_split.training.scores import add, scores_of

_CAUSAL = ModelConfig()  # whose task has no scores


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One model's result on one client's held-out data."""

    loss_sum: float  # nats, over all label tokens
    num_tokens: int  # label tokens
    sums: Mapping[str, float] = field(default_factory=dict)  # see flower_split.training.scores

    @property
    def perplexity(self) -> float:
        """exp(loss per token); infinite where that overflows, NaN without a token."""
        if self.num_tokens == 0:
            return math.nan
        try:
            return math.exp(self.loss_sum / self.num_tokens)
        except OverflowError:
            return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOutcome:
    """Everything the summary needs to know of one client."""

    partition_id: int
    before: HeldOut  # the base model on this client's held-out data
    after: HeldOut  # the federated model on the same data
    local_only: Mapping[int, HeldOut] = field(default_factory=dict)
    """This client's alone-trained model, by the partition whose held-out data it was tried on."""
    personal: HeldOut | None = None  # its own model, before averaging, on the same data
    name: str = ""  # what the data is about, for people


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """Perplexities of one client, or of all of them together; None where nothing was measured."""

    client: str
    num_tokens: int  # held-out label tokens
    base: float
    federated: float
    local_own: float | None  # alone-trained, on its own held-out data
    local_others: float | None  # alone-trained, on the other clients' held-out data
    personalised: float | None = None  # each client's own model, before averaging
    base_scores: Mapping[str, float] = field(
        default_factory=dict
    )  # name -> value, as the task has them
    federated_scores: Mapping[str, float] = field(default_factory=dict)


def summarize(outcomes: Sequence[ClientOutcome], model: ModelConfig = _CAUSAL) -> list[SummaryRow]:
    """Return one row per client in order of partition, then one for all clients.

    Every perplexity pools tokens: the exponential of summed loss over summed tokens, so that the
    last row is that of the union of the clients' held-out data. Its ``local_others`` pools every
    pair of an alone-trained model and another client's data.

    Args:
        outcomes: One of each client.
        model: The task and its classes, for its scores.

    Raises:
        FederationError: There is no outcome, or a partition comes twice.
    """
    ordered = sorted(outcomes, key=lambda outcome: outcome.partition_id)
    partitions = [outcome.partition_id for outcome in ordered]
    if not ordered or len(set(partitions)) < len(partitions):
        raise FederationError(
            f"a summary needs one outcome per client; the partitions are {partitions}. "
            "Run with fraction-evaluate above 0."
        )

    def row(client: str, group: Sequence[ClientOutcome]) -> SummaryRow:
        pairs = [(o.partition_id, p, result) for o in group for p, result in o.local_only.items()]
        before, after = pool(o.before for o in group), pool(o.after for o in group)
        return SummaryRow(
            client=client,
            num_tokens=before.num_tokens,
            base=before.perplexity,
            federated=after.perplexity,
            base_scores=scores_of(before.sums, model),
            federated_scores=scores_of(after.sums, model),
            personalised=_perplexity([o.personal for o in group if o.personal is not None]),
            local_own=_perplexity([result for mine, other, result in pairs if mine == other]),
            local_others=_perplexity([result for mine, other, result in pairs if mine != other]),
        )

    rows = [row(f"{o.partition_id} {o.name}".rstrip(), [o]) for o in ordered]
    return [*rows, row("all clients", ordered)]


def pool(results: Iterable[HeldOut]) -> HeldOut:
    """Return the result on the union of the held-out data."""
    losses, tokens = [], 0
    sums: dict[str, float] = {}
    for result in results:
        losses.append(result.loss_sum)
        tokens += result.num_tokens
        add(sums, result.sums)
    return HeldOut(math.fsum(losses), tokens, sums)


def _perplexity(results: Sequence[HeldOut]) -> float | None:
    return pool(results).perplexity if results else None


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Return ``rows`` as a table for the terminal; the last one is set apart as the total."""
    header, *body = summary_cells(rows)
    table = Table(title="Held-out perplexity (lower is better)", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for index, cells in enumerate(body):
        last = index == len(body) - 1
        if last:
            table.add_section()
        table.add_row(*cells, style="bold" if last else None)
    return table


def print_summary(console: Console, rows: Sequence[SummaryRow], run_dir: Path) -> None:
    """Show the summary and where everything else is."""
    console.print(summary_table(rows))
    console.print(f"run directory: {run_dir}", highlight=False, soft_wrap=True, markup=False)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return header and rows as a Markdown table, the first column to the left, the others right."""
    header, *body = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def summary_cells(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Return header and rows as text, for any table; without the columns that nobody measured."""
    personalised = any(row.personalised is not None for row in rows)
    with_local = any(row.local_own is not None or row.local_others is not None for row in rows)
    lines = [["client", "tokens", "base", "federated", "change"]]
    scores = list(rows[0].federated_scores) if rows else []
    lines[0] += [f"{name}: base, federated" for name in scores]
    lines[0] += ["personalised"] if personalised else []
    if with_local:
        lines[0] += ["alone: own data", "alone: others' data"]
    for row in rows:
        change = 100 * (row.federated / row.base - 1)
        cells = [row.client, f"{row.num_tokens:,}", _number(row.base), _number(row.federated)]
        cells.append(f"{change:+.1f} %")
        cells += [_scores(row, name) for name in scores]
        cells += [_number(row.personalised)] if personalised else []
        if with_local:
            cells += [_number(row.local_own), _number(row.local_others)]
        lines.append(cells)
    return lines


def _scores(row: SummaryRow, name: str) -> str:
    found = [scores.get(name) for scores in (row.base_scores, row.federated_scores)]
    return " → ".join("–" if value is None else f"{value:.3f}" for value in found)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
