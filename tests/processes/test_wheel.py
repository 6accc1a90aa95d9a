"""The wheel alone, in an empty directory: `flower-split new job && flower-split run job`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT
from tests.support.flower_home import BIN, Flower


def run(*command: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow  # builds, installs and simulates four rounds
@pytest.mark.timeout(1200)
def test_new_app_runs_from_the_installed_wheel_in_an_empty_directory(
    flower: Flower, tmp_path: Path
) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel")
    env, wheels, installed = dict(flower.env), tmp_path / "wheels", tmp_path / "installed"
    here = tmp_path / "empty"
    here.mkdir()
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        str(wheels),
        cwd=ROOT,
        env=env,
    )
    [wheel] = wheels.glob("*.whl")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(installed))
    run(sys.executable, "-m", "pip", *install, str(wheel), cwd=here, env=env)

    env |= {"PYTHONPATH": str(installed), "PATH": f"{BIN}:{os.environ['PATH']}"}
    where = "import flower_split; print(flower_split.__file__)"
    assert str(installed) in run(sys.executable, "-c", where, cwd=here, env=env)
    command = str(installed / "bin" / "flower-split")
    run(command, "new", "job", cwd=here, env=env)
    run(command, "run", "job", cwd=here, env=env)
    [summary] = (here / "runs").glob("*/summary.json")
    assert '"clients": 2' in summary.read_text()
