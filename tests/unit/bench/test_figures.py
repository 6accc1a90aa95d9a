"""The figures of a benchmark: medians and ratios, as a table, as JSON and as a picture."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flower_split.bench.figures import Figures, Row
from flower_split.bench.machine import describe_machine
from flower_split.cli.main import main


def figures() -> Figures:
    return Figures(
        name="example",
        title="An example",
        machine={"cpu": "one", "gpu": "none"},
        settings={"steps": 3},
        rows=[
            Row(what="plain", seconds=(0.2, 0.1, 0.4), base="plain"),
            Row(what="split", seconds=(0.3, 0.5), base="plain", beside={"trunk ms": 120.0}),
            Row(what="alone", seconds=(2.0,)),
        ],
    )


def test_medians_and_ratios_are_those_of_the_repetitions() -> None:
    found = figures()
    assert [row.median for row in found.rows] == [0.2, 0.4, 2.0]
    assert [found.ratio(row) for row in found.rows] == [1.0, 2.0, None]


def test_the_table_has_spreads_ratios_and_the_machine() -> None:
    text = io.StringIO()
    figures().tell(Console(file=text, width=140), None)
    lines = [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]
    assert "plain 200.00 100.00 400.00 1.00 plain" in lines
    assert "split 400.00 300.00 500.00 2.00 plain 120" in lines
    assert "alone 2000 2000 2000" in lines
    assert "cpu one, gpu none" in lines


def test_out_gets_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures().tell(Console(file=io.StringIO()), tmp_path / "new")
    told = json.loads((tmp_path / "new" / "example.json").read_text())
    assert told["machine"] == {"cpu": "one", "gpu": "none"}
    assert told["rows"][1] == {
        "what": "split",
        "median_seconds": 0.4,
        "seconds": [0.3, 0.5],
        "base": "plain",
        "ratio": 2.0,
        "trunk ms": 120.0,
    }
    assert (tmp_path / "new" / "example.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_is_named() -> None:
    found = describe_machine()
    assert found["cpu"] and int(found["cores"]) > 0 and found["torch"]


def test_bench_memory_measures_the_smallest_trunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "--steps", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "one device" in out and "4 layers" in out
