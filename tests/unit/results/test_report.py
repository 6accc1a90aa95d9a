"""The report's page against the lines of ``metrics.jsonl``, read here without the package."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flower_split.cli.main import main
from flower_split.cli.report import check_reports, write_reports_of
from flower_split.config import RunConfig
from flower_split.errors import ConfigError
from flower_split.results.report import page
from flower_split.results.report.page import MAX_BYTES, write_report
from flower_split.runs.directory import RunDirectory
from flower_split.runs.samples import Sample, write_samples
from flower_split.runs.summary import ClientOutcome, HeldOut, summarize
from tests.support.distributions import installed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make_run(path: Path, **changes: Any) -> Path:
    """A run of two rounds, three steps and two clients, one of which is left out once."""
    run = RunDirectory.create(RunConfig(run_dir=str(path), **changes))
    for slot, name in enumerate(("sea </script>", "land")):
        facts = {"num_examples": 5, "num_eval_examples": 2, "planned_steps": 3}
        run.append("data", {"server_round": 0, "partition_id": slot, "name": name, **facts})
    for number in (0, 1, 2):
        for slot in (0, 1):
            held_out = {
                "loss_sum": 9.0 - number,
                "num_tokens": 4,
                "perplexity": 8.5 - number - slot,
            }
            run.append("evaluation", {"server_round": number, "partition_id": slot, **held_out})
            for step in range(3 if number else 0):
                times = {
                    "compute_seconds": 0.25 * (slot + 1), "wait_seconds": 0.0625 * step,
                    "trunk_seconds": 0.125, "wire_seconds": 0.5,
                }  # fmt: skip
                loss = {"loss": 3.0 - 0.1 * step - number, "num_tokens": 7}
                run.append(
                    "step",
                    {"server_round": number, "partition_id": slot, "step": step, **loss, **times},
                )
            counts = {"activations_up": 1000 * (slot + 1), "adapters_down": 10}
            run.append("bytes", {"server_round": number, "partition_id": slot, **counts})
        run.append("round", {"server_round": number, "seconds": 2.0, "perplexity": 8.0 - number})
    left_out = {"1": "its gradient was not finite"}
    run.append("trunk", {"server_round": 2, "activation_peak_bytes": 4096, "left_out": left_out})
    outcomes = [
        ClientOutcome(partition_id=slot, before=HeldOut(9.0, 4), after=HeldOut(7.0, 4), name=name)
        for slot, name in enumerate(("sea", "land"))
    ]
    run.write_outcome(summarize(outcomes), facts={"seconds": 4.0}, notes=["A <note>."])
    return path


class Page(HTMLParser):
    """The charts' specifications, and the text of the tables' cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.specs: dict[str, Any] = {}
        self.cells: list[str] = []
        self.loads: list[str] = []
        self._chart: str | None = None
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        self._chart = found.get("data-chart") if tag == "script" else None
        self._cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._chart:
            self.specs[self._chart] = json.loads(data)
        elif self._cell:
            self.cells.append(data)

    def rows(self, chart: str) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = self.specs[chart]["data"]["values"]
        return values


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Vega is there once; making its bundle takes a second."""
    pytest.importorskip("vl_convert")


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_report_of_a_run_has_the_numbers_of_its_metrics(tmp_path: Path, javascript: None) -> None:
    run = make_run(tmp_path / "run")
    assert "Sample generations" not in write_report([run], run / "report.html").read_text()
    write_samples(run, [Sample(prompt="Hi", base="one\n<two>", trained="three")])
    out = write_report([run], run / "report.html")
    assert out.stat().st_size < MAX_BYTES
    text = out.read_text()
    found = Page(text)
    assert found.loads == [] and "@import" not in text

    names = {0: "0 sea </script>", 1: "1 land"}
    steps = lines_of(run, "step")
    assert [(r["client"], r["round"], r["loss"]) for r in found.rows("loss")] == [
        (names[line["partition_id"]], line["server_round"], line["loss"]) for line in steps
    ]
    perplexities = [r for r in found.rows("perplexity") if r["client"] != "all clients"]
    assert [(r["client"], r["round"], r["perplexity"]) for r in perplexities] == [
        (names[e["partition_id"]], e["server_round"], e["perplexity"])
        for e in lines_of(run, "evaluation")
    ]
    overall = [r["perplexity"] for r in found.rows("perplexity") if r["client"] == "all clients"]
    assert overall == [line["perplexity"] for line in lines_of(run, "round")] == [8.0, 7.0, 6.0]
    totals = {(r["client"], r["kind"]): r["bytes"] for r in found.rows("bytes")}
    assert totals == {
        (names[0], "activations_up"): 3000, (names[0], "adapters_down"): 30,
        (names[1], "activations_up"): 6000, (names[1], "adapters_down"): 30,
    }  # fmt: skip
    assert [r["activation_peak_bytes"] for r in found.rows("memory")] == [4096]
    assert "its gradient was not finite" in found.cells
    assert "A &lt;note&gt;." in text
    assert "<td>Hi</td><td>one\n&lt;two&gt;</td><td>three</td>" in text


def test_report_lays_a_clients_step_times_end_to_end(tmp_path: Path, javascript: None) -> None:
    run = make_run(tmp_path / "run")
    found = Page(write_report([run], run / "report.html").read_text())
    rows = [r for r in found.rows("timeline") if (r["round"], r["client"]) == (2, "1 land")]
    # 0.5 computing, 0.5 on the wire, 0.125 of the trunk, and a sixteenth of a second more in each step
    assert [(r["part"], r["start"], r["end"]) for r in rows] == [
        ("client computes", 0.0, 0.5), ("wire", 0.5, 1.0), ("trunk computes", 1.0, 1.125),
        ("client computes", 1.125, 1.625), ("wire", 1.625, 2.125), ("trunk computes", 2.125, 2.25),
        ("client waits", 2.25, 2.3125),
        ("client computes", 2.3125, 2.8125), ("wire", 2.8125, 3.3125),
        ("trunk computes", 3.3125, 3.4375), ("client waits", 3.4375, 3.5625),
    ]  # fmt: skip
    shares = {(r["client"], r["part"]): r["seconds"] for r in found.rows("shares")}
    assert shares["1 land", "client waits"] == 2 * (0.0625 + 0.125)
    states = {(r["round"], r["client"]): r["state"] for r in found.rows("participation")}
    assert states[1, "1 land"] == "trained" and states[2, "1 land"] == "left out by the trunk"


def test_report_of_several_runs_names_what_differs(tmp_path: Path, javascript: None) -> None:
    runs = [make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b", seed=7, mode="frozen")]
    figures = tmp_path / "figures"
    found = Page(write_report(runs, tmp_path / "both.html", figures).read_text())
    rows = [found.cells[i : i + 3] for i in range(len(found.cells))]
    assert ["mode", "'joint'", "'frozen'"] in rows and ["seed", "0", "7"] in rows
    assert {r["run"] for r in found.rows("perplexity")} == {"a", "b"}
    assert (figures / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (figures / "timeline.pdf").read_bytes().startswith(b"%PDF")


def test_report_without_its_library_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_LIBRARY", "no_library_of_this_name")
    with pytest.raises(ConfigError, match=r"pip install 'flower-split\[report\]'"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.slow  # a browser starts
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_report_is_drawn_by_a_browser_without_an_error(
    tmp_path: Path, javascript: None, width: int
) -> None:
    run = make_run(tmp_path / "run")
    out = write_report([run], run / "report.html")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--window-size={width},2000", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", f"file://{out}"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert done.stdout.count('data-drawn="yes"') == 7, done.stderr
    assert "cannot be drawn" not in re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "CONSOLE" not in done.stderr, done.stderr


def test_report_of_another_form_is_written_by_its_name_and_several_need_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my_reports.py").write_text(MINE)
    with installed(tmp_path / "site"):
        assert main(["report", str(run), "--form", "my_reports:Rounds"]) == 0
        assert (run / "rounds.txt").read_text() == "run: 3 rounds\n"
        assert capsys.readouterr().out == f"report: {run / 'rounds.txt'}\n"
        out = tmp_path / "both.txt"
        assert main(["report", str(run), str(run), "--form", "my_reports:Rounds"]) == 2
        assert "needs a file to go to" in capsys.readouterr().err
        both = ["report", str(run), str(run), "--form", "my_reports:Rounds", "--out", str(out)]
        assert main(both) == 0
        assert len(out.read_text().splitlines()) == 2
        assert main(["report", str(run), "--form", "my_reports:Fails"]) == 1
        assert "Fails cannot be written to" in capsys.readouterr().err
        assert main([*both, "--figures", str(tmp_path / "figures")]) == 2
        assert "--figures are the charts of the report 'html'" in capsys.readouterr().err


MINE = """
from flower_split.results.report.report import Report

class Rounds(Report):
    file = "rounds.txt"
    def write(self, runs, out):
        out.write_text("".join(f"{run.name}: {len(run.of('round'))} rounds\\n" for run in runs))

class Fails(Rounds):
    def write(self, runs, out):
        raise OSError("no paper")
"""


def test_a_finished_run_gets_the_reports_that_its_configuration_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my_reports.py").write_text(MINE)
    with installed(tmp_path / "site"):
        done = make_run(tmp_path / "done", report="my_reports:Rounds")
        write_reports_of(done)
        assert (done / "rounds.txt").exists() and not (done / "report.html").exists()
        (done / "summary.json").unlink()
        (done / "rounds.txt").unlink()
        write_reports_of(done)  # of a run that has not finished: nothing
        assert not (done / "rounds.txt").exists()
    with pytest.raises(ConfigError, match="report 'nowhere' is unknown.*html"):
        check_reports(RunConfig(report="html, nowhere"))
    check_reports(RunConfig(report=""))


def test_html_is_no_error_where_its_extra_is_missing_and_nobody_asks_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_LIBRARY", "no_such_library")
    check_reports(RunConfig())
    run = make_run(tmp_path / "run")
    write_reports_of(run)
    assert not (run / "report.html").exists()
