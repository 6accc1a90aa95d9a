"""Perplexities of the summary, against sums done by hand, and how they are shown."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from flower_split.errors import FederationError
from flower_split.runs.summary import (
    ClientOutcome,
    HeldOut,
    markdown_table,
    print_summary,
    summarize,
    summary_cells,
)


def _result(perplexity: float, tokens: int) -> HeldOut:
    return HeldOut(tokens * math.log(perplexity), tokens)


@pytest.fixture
def outcomes() -> list[ClientOutcome]:
    return [
        ClientOutcome(
            partition_id=1,
            name="tools",
            before=_result(64, 30),
            after=_result(8, 30),
            local_only={0: _result(32, 10), 1: _result(4, 30)},
        ),
        ClientOutcome(
            partition_id=0,
            before=_result(4, 10),
            after=_result(2, 10),
            local_only={0: _result(2, 10), 1: _result(16, 30)},
        ),
    ]


def test_summary_of_two_clients_pools_tokens(outcomes: list[ClientOutcome]) -> None:
    first, second, overall = summarize(outcomes)
    assert [row.client for row in (first, second, overall)] == ["0", "1 tools", "all clients"]
    assert (first.base, second.federated) == (pytest.approx(4), pytest.approx(8))
    assert (first.local_own, first.local_others) == (pytest.approx(2), pytest.approx(16))
    assert (second.local_own, second.local_others) == (pytest.approx(4), pytest.approx(32))
    # in powers of two: (10 * 2 + 30 * 6) / 40 = 5 and (10 * 1 + 30 * 3) / 40 = 2.5
    assert overall.num_tokens == 40
    assert overall.base == pytest.approx(2**5)
    assert overall.federated == pytest.approx(2**2.5)
    # own: (10 * 1 + 30 * 2) / 40 = 1.75; others: (30 * 4 + 10 * 5) / 40 = 4.25
    assert overall.local_own == pytest.approx(2**1.75)
    assert overall.local_others == pytest.approx(2**4.25)


def test_summary_without_local_training_has_no_such_columns() -> None:
    rows = summarize(
        [ClientOutcome(partition_id=0, before=_result(4, 1), after=_result(2, 1), local_only={})]
    )
    assert rows[0].local_own is rows[-1].local_others is None
    assert summary_cells(rows)[0] == ["client", "tokens", "base", "federated", "change"]


def test_summary_of_no_or_doubled_clients_is_refused(outcomes: list[ClientOutcome]) -> None:
    for wrong in ([], [outcomes[0], outcomes[0]]):
        with pytest.raises(FederationError, match="one outcome per client"):
            summarize(wrong)


def test_perplexity_beyond_floats_is_infinite_and_of_nothing_nan() -> None:
    assert HeldOut(1e6, 1).perplexity == math.inf
    assert math.isnan(HeldOut(0.0, 0).perplexity)


def test_summary_printed_shows_every_row_and_the_path(outcomes: list[ClientOutcome]) -> None:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=120), summarize(outcomes), Path("/runs/[one]"))
    text = stream.getvalue()
    assert "1 tools" in text and "all clients" in text and "-87.5 %" in text
    assert "run directory: /runs/[one]" in text


def test_markdown_table_escapes_bars() -> None:
    assert markdown_table([["a", "b"], ["x|y", "1"]]) == "| a | b |\n| :--- | ---: |\n| x\\|y | 1 |"
