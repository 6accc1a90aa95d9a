"""The checks of reports, loggers and window rules pass for what is built in, and find what is broken."""

import doctest
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from flower_split.results.report.page import can_be_written
from flower_split.results.report.report import HtmlReport, Report
from flower_split.results.report.rows import RunData
from flower_split.runs.loggers.logger import LoggedRun, MetricLogger, Record
from flower_split.testing import ConformanceError, check_logger, check_report, check_window_rule
from flower_split.trunk.engine.window_rules import QuorumAlone, WindowMember, WindowRule


@pytest.mark.skipif(not can_be_written(), reason="needs the extra report")
def test_the_page_with_charts_conforms() -> None:
    check_report(HtmlReport)


def test_the_quorum_conforms() -> None:
    check_window_rule(QuorumAlone())


class Names(Report):
    file: ClassVar[str] = "names.txt"

    def write(self, runs: Sequence[RunData], out: Path) -> None:
        out.write_text("\n".join(run.name for run in runs))


class TakesMetrics(Names):
    file = "metrics.jsonl"


class Nowhere(Names):
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        pass


class WritesBeside(Names):
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        super().write(runs, out)
        (out.parent / "more.txt").write_text("more")


class ChangesMetrics(Names):
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        super().write(runs, out)
        (runs[0].path / "metrics.jsonl").write_text("")


class NeverTheSame(Names):
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        out.write_text(secrets.token_hex(8))


class NeedsAnOutcome(Names):
    def write(self, runs: Sequence[RunData], out: Path) -> None:
        out.write_text(str(runs[0].summary["overall"]))


class NeedsAnArgument(Names):
    def __init__(self, colour: str) -> None:
        self.colour = colour


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (TakesMetrics, "none of the run directory's own; it is 'metrics.jsonl'"),
        (Nowhere, "write its file about begun; it is missing"),
        (WritesBeside, "write nothing but its file"),
        (ChangesMetrics, "write nothing but its file"),
        (NeverTheSame, "write the same file again"),
        (NeedsAnOutcome, "about begun; it raised KeyError"),
        (NeedsAnArgument, "be made without arguments"),
    ],
)
def test_a_report_that_breaks_a_clause_is_found(broken: type[Report], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"report {broken.__name__} must .*{words}"):
        check_report(broken)


class Forgets(WindowRule):
    calls = 0

    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        Forgets.calls += 1
        return "" if Forgets.calls % 2 else "not now"


class WantsMoreToLeave(WindowRule):
    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        return "only one" if sum(bool(member.problem) for member in members) == 1 else ""


class SaysYes(WindowRule):
    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        return True  # type: ignore[return-value]


class NeedsAPlan(WindowRule):
    def refusal(self, window: int, members: Sequence[WindowMember]) -> str:
        return "late" if min(int(member.planned_steps) for member in members) < 2 else ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Forgets, "say the same"),
        (WantsMoreToLeave, r"go on without \[1\] where it lets one go on without \[0, 1\]"),
        (SaysYes, "say why in a text; it said True"),
        (NeedsAPlan, "answer for every window; it raised TypeError"),
    ],
)
def test_a_window_rule_that_breaks_a_clause_is_found(broken: type[WindowRule], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"window rule {broken.__name__} must .*{words}"):
        check_window_rule(broken())


class Losses(MetricLogger):
    def start(self, run: LoggedRun) -> None:
        self.run = run

    def log(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


class Shouts(Losses):
    def log(self, record: Record) -> None:
        record["kind"] = "LOUD"  # type: ignore[index]


class NeedsLosses(Losses):
    def log(self, record: Record) -> None:
        float(record["loss"])  # type: ignore[arg-type]


class CutsMetrics(Losses):
    def close(self) -> None:
        (self.run.path / "metrics.jsonl").write_text("")


class NeedsAKey(Losses):
    def __init__(self, key: str) -> None:
        self.key = key


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Shouts, "leave the lines that it is told"),
        (NeedsLosses, "it raised KeyError"),
        (CutsMetrics, "leave config.json, versions.json, metrics.jsonl"),
        (NeedsAKey, "be made without arguments"),
    ],
)
def test_a_logger_that_breaks_a_clause_is_found(broken: type[MetricLogger], words: str) -> None:
    with pytest.raises(ConformanceError, match=f"logger {broken.__name__} must .*{words}"):
        check_logger(broken)


@pytest.mark.parametrize("name", ["loggers", "reports", "window_rules"])
def test_the_examples_run(name: str) -> None:
    failed, tried = doctest.testmod(sys.modules[f"flower_split.testing.{name}"])
    assert failed == 0 and tried > 0
