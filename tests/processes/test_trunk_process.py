"""The trunk as a child process: it serves, says why it cannot, and never outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from flower_split.config import RunConfig, parse_run_config
from flower_split.errors import TrunkRefused, TrunkUnavailable
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.server.trunk_process import TrunkProcess
from tests.support.tiny_app import make_data, make_model, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("trunk")
    return parse_run_config(tiny_config(make_model(root / "model"), make_data(root / "data", 2)))


def test_trunk_process_serves_its_fingerprint_to_the_token_and_ends(config: RunConfig) -> None:
    with closing(TrunkProcess.start(config, 120)) as trunk:
        with closing(TrunkCoordinator(trunk.address, trunk.token, timeout=20)) as coordinator:
            assert coordinator.status().fingerprint["cut-layers"] == "1:3"
            assert any("lora_A" in name for name in coordinator.get_adapter())
        with (
            closing(TrunkCoordinator(trunk.address, "not the token", timeout=20)) as stranger,
            pytest.raises(TrunkRefused),
        ):
            stranger.status()
        assert trunk.alive
    assert not trunk.alive


def test_trunk_process_of_a_model_that_is_not_there_says_why(config: RunConfig) -> None:
    broken = parse_run_config(
        {"model.name": "/nowhere/at/all", "model.first-cut": 1, "model.second-cut": 3}
    )
    with pytest.raises(TrunkUnavailable, match="/nowhere/at/all") as caught:
        TrunkProcess.start(broken, 120)
    assert "\n" not in str(caught.value)


def test_trunk_process_that_is_too_slow_is_ended_and_told(config: RunConfig) -> None:
    with pytest.raises(TrunkUnavailable, match="join-timeout"):
        TrunkProcess.start(config, 0.05)


def test_trunk_process_ends_when_its_parent_is_killed(config: RunConfig, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from flower_split.config import parse_run_config\n"
        "from flower_split.server.trunk_process import TrunkProcess\n"
        f"trunk = TrunkProcess.start(parse_run_config({tiny_values(config)!r}), 120)\n"
        "print(trunk._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it runs
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 20
        while _runs(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(child)


def tiny_values(config: RunConfig) -> dict[str, object]:
    from flower_split.config import resolved_run_config

    return dict(resolved_run_config(config))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
