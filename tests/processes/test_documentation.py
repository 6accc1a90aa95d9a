"""The documentation's commands, run as they stand in a folder that looks like a fresh clone.

`block PAGE NAME` in :data:`SCRIPTS` names blocks; blocks of one name on one page run as one script.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.documentation import ROOT, blocks
from tests.support.flower_home import BIN, Flower

SCRIPTS = [
    pytest.param("block docs/tutorial.md tutorial", ["tutorial"]),
    pytest.param("block docs/how-to/doctor.md doctor", []),
    pytest.param("block docs/how-to/doctor.md certs", ["certificates"]),
    pytest.param("block docs/how-to/plan.md plan", [], marks=pytest.mark.slow),
    pytest.param("block docs/how-to/hub-models.md hub-models", [], marks=pytest.mark.slow),
    pytest.param("block docs/scale.md simulate", [], marks=pytest.mark.slow),
    pytest.param("block docs/how-to/new-app.md new-app", ["job/job"], marks=pytest.mark.slow),
    pytest.param(
        "block docs/how-to/new-app.md own-jsonl",
        ["first/metrics.jsonl", "first/samples.json", "first/report.html"],
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "block docs/how-to/experiments.md experiments",
        ["sweeps/modes/runs"],
        marks=pytest.mark.slow,
    ),
    pytest.param("block docs/how-to/resume.md resume", ["resumed"], marks=pytest.mark.slow),
    pytest.param(
        "block docs/how-to/differential-privacy.md differential-privacy",
        [],
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "block docs/how-to/different-clients.md different-clients",
        ["different"],
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "block docs/how-to/asynchronous-rounds.md asynchronous-rounds",
        [],
        marks=pytest.mark.slow,
    ),
]


def script(named: str) -> str:
    """The blocks' lines, ending at the first command that fails."""
    _, page, name = named.split()
    found = [block.text for block in blocks("bash", [ROOT / page]) if block.name == name]
    assert found, f"no block {name} on {page}"
    return "set -euo pipefail\n" + "\n".join(found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("named", "folders"), SCRIPTS)
def test_commands_of_a_page_run(
    named: str, folders: list[str], flower: Flower, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "simulations").symlink_to(ROOT / "simulations")
    done = subprocess.run(
        ["bash", "-c", script(named)],
        cwd=clone,
        env={**flower.env, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert all((clone / made).exists() for made in folders), done.stdout
    if "tutorial" in folders:
        assert "The harbour team." in done.stdout and "The orchard team." in done.stdout
