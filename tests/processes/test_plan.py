"""Memory and bytes that ``flower-split plan`` says, against a trunk and a client that are processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flower_split.cli.plan.command import client_memory, trunk_memory
from flower_split.cli.plan.dry_run import dry_run
from flower_split.cli.plan.wire_bytes import step_bytes
from tests.support.measured_job import EXPERIMENT, job


@pytest.mark.slow  # three processes that load torch; tests/unit/cli/test_plan.py has a sample
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux tells")
def test_plan_is_within_15_percent_of_the_memory_and_has_the_bytes(tmp_path: Path) -> None:
    # glibc's heap keeps what is freed; memory maps are given back, so that the peak is of what lives.
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.measured_job", str(tmp_path)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    config = job(tmp_path)
    run = dry_run(config)
    assert client_memory(config, run).total == pytest.approx(found["client"], rel=0.15), found
    assert trunk_memory(config, run).total == pytest.approx(found["trunk"], rel=0.15), found
    planned = [step_bytes(config, run, EXPERIMENT, step) for step in (0, 1)]
    # The job's one padded position leaves the position before it without a label: one row of zeros more
    # than full rows have, of 256 values in fp32, which travels in neither direction.
    row = 256 * 4
    assert [[step.sent - row, step.received - row] for step in planned] == found["steps"]
