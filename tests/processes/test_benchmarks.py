"""The benchmarks run, at their smallest, and print what they promise."""

import re
import subprocess
import sys

import pytest


def run(request: pytest.FixtureRequest, name: str, *options: str) -> str:
    """The output of a benchmark."""
    script = request.config.rootpath / "simulations" / "benchmarks" / name
    done = subprocess.run(
        [sys.executable, script, *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_wire_prints_grpc_beside_tcp_and_shared_memory_beside_memcpy(
    request: pytest.FixtureRequest,
) -> None:
    out = run(request, "wire.py", "--repeats", "2", "--sizes", "0.1")
    number = r" +\d+\.\d+"
    row = rf"^ *0\.10{number} \|(?:{number}){{4}} \|{number} \|(?:{number}){{4}}$"
    assert re.search(row, out, re.MULTILINE), out


@pytest.mark.slow
def test_split_step_prints_the_split_step_beside_the_unsplit(
    request: pytest.FixtureRequest,
) -> None:
    out = run(request, "split_step.py", "--clients", "1", "--steps", "2", "--device", "cpu")
    assert re.search(r"unsplit.*1\.00", out), out
    assert re.search(r"1 clients x 8 sequences", out), out
