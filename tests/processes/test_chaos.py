"""The chaos command: a real job under kills and network faults ends on the hash of the fault-free run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "simulations" / "chaos" / "run.py"


def chaos(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )


def test_chaos_sample_of_kills_and_network_faults_ends_on_the_expected_hash(tmp_path):
    options = ["--faults-per-run", "5", "--rounds", "2", "--seed", "7", "--network"]
    done = chaos("--faults", "5", *options, "--keep", str(tmp_path / "runs"), timeout=280)
    assert done.returncode == 0, done.stdout
    assert "on the expected hash, 0 not" in done.stdout
    assert "kill" in done.stdout  # something has died, or the sample shows nothing
    assert re.search(r"and [1-9][0-9]* duplicated connections", done.stdout), done.stdout


@pytest.mark.slow
def test_chaos_200_kills_at_random_times_and_at_every_failpoint(tmp_path):
    done = chaos("--faults", "200", "--keep", str(tmp_path / "runs"), timeout=3000)
    assert done.returncode == 0, done.stdout
    never = [
        line for line in done.stdout.splitlines() if "killed at" in line and line.endswith(" 0")
    ]
    assert not never, done.stdout
    slowest = re.search(r"slowest recovery, .*: ([0-9.]+) s", done.stdout)
    assert slowest is not None and 0 < float(slowest.group(1)) < 30, done.stdout


@pytest.mark.slow
def test_chaos_of_buffered_rounds_ends_on_the_expected_hash(tmp_path):
    done = chaos("--faults", "24", "--fedbuff", "--keep", str(tmp_path / "runs"), timeout=600)
    assert done.returncode == 0, done.stdout
    assert "on the expected hash, 0 not" in done.stdout
    arrivals = (tmp_path / "runs" / "reference" / "run" / "metrics.jsonl").read_text()
    assert '"kind": "arrival"' in arrivals


@pytest.mark.slow
def test_chaos_of_a_supervised_trunk_recovers_by_itself(tmp_path):
    options = ["--supervised", "--faults-per-run", "3", "--rounds", "12"]
    done = chaos("--faults", "3", *options, "--keep", str(tmp_path / "runs"), timeout=500)
    assert done.returncode == 0, done.stdout
    assert "kill child trunk" in done.stdout


@pytest.mark.slow
def test_chaos_without_dedupe_reports_differences(tmp_path):
    options = ["--faults-per-run", "8", "--rounds", "3", "--seed", "7"]
    done = chaos("--faults", "8", *options, "--no-dedupe", "--keep", str(tmp_path), timeout=280)
    assert done.returncode == 1, done.stdout
    assert "DIFFERENT" in done.stdout
