"""Ctrl-C, a second Ctrl-C, and attach, with a real SuperLink and a real run."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flower_split.runtime.exit_codes import COMPLETED, DETACHED, STOPPED
from tests.support.flower_home import BIN, Flower
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # real runs: a minute each, more if busy


def processes_that_name(folder: Path) -> list[int]:
    """Return the processes whose command line names a path under ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@contextmanager
def started(flower: Flower, root: Path, rounds: int, after: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run, and yield its command once a line of kind ``after`` is in its metrics."""
    model, data = make_model(root / "model"), make_data(root / "data", 2)
    config = tiny_config(
        model, data, num_clients=2, num_server_rounds=rounds, local_only_baseline=False
    )
    app = make_app(root / "app", {**config, "run-dir": str(root / "run")})
    process = subprocess.Popen(
        [str(BIN / "flower-split"), "run", str(app)],
        env=dict(flower.env), cwd=root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        metrics, deadline = root / "run" / "metrics.jsonl", time.monotonic() + 400
        while not (metrics.is_file() and f'"{after}"' in metrics.read_text()):
            assert time.monotonic() < deadline, "no step of the run within 400 s"
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def waits_until_nobody_names(folder: Path, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := processes_that_name(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_ctrl_c_stops_the_run_and_leaves_no_process(flower: Flower, tmp_path: Path) -> None:
    with started(flower, tmp_path, 10_000, after="step") as process:
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=300)[0]
    assert process.returncode == STOPPED, text
    assert "press Ctrl-C again to leave it running" in text
    assert "finished:stopped" in text and "Traceback" not in text
    assert waits_until_nobody_names(tmp_path, 20) == []


def test_second_ctrl_c_leaves_the_run_and_attach_follows_it_to_its_end(
    flower: Flower, tmp_path: Path
) -> None:
    with started(flower, tmp_path, 6, after="step") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)  # a press of its own: two pending signals would be one
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
    assert process.returncode == DETACHED, text
    run = tmp_path / "run"
    assert f"flower-split attach {run}" in text and "goes on" in text
    done = flower.command("flower-split", "attach", str(run), timeout=400)
    assert done.returncode == COMPLETED, done.stdout
    assert (run / "summary.json").is_file()
    assert waits_until_nobody_names(tmp_path, 20) == []


def test_attach_stops_a_run_that_was_left(flower: Flower, tmp_path: Path) -> None:
    with started(flower, tmp_path, 10_000, after="step") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
    assert process.returncode == DETACHED, text
    done = flower.command("flower-split", "attach", str(tmp_path / "run"), "--stop", timeout=300)
    assert done.returncode == STOPPED, done.stdout
    assert waits_until_nobody_names(tmp_path, 20) == []
