"""A Flower installation of the tests' own: home, ports and SuperLink, ended by process id."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes_of(home: Path) -> list[int]:
    """Ids of all processes whose FLWR_HOME is ``home``: exactly those the tests started."""
    wanted = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def end(pids: list[int]) -> None:
    """End processes by id: first politely, then by force."""
    for kind, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        for pid in pids:
            try:
                os.kill(pid, kind)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            pids = [pid for pid in pids if _runs(pid)]
            if not pids:
                return
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass(frozen=True)
class Outcome:
    """What one ``flwr run`` gave."""

    status: str
    details: str
    output: str


@dataclass(frozen=True)
class Flower:
    """Runs commands in an isolated Flower home."""

    home: Path
    env: Mapping[str, str]

    def command(self, *args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment, such as ``flwr`` or ``flower-split``."""
        return subprocess.run(
            [str(BIN / args[0]), *args[1:]],
            env=dict(self.env),
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def run(
        self, app: Path, config: Mapping[str, object], federation: str, *superlink: str
    ) -> Outcome:
        """``flwr run`` to its end, with its true status."""
        overrides = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        args = ["--run-config", overrides] if overrides else []
        args += ["--federation-config", federation] if federation else []
        done = self.command("flwr", "run", str(app), *superlink, "--stream", *args)
        listed = self.command("flwr", "ls", *superlink, "--limit", "1", "--format", "json")
        run = json.loads(listed.stdout)["runs"][0]
        return Outcome(run["status"], run["status-details"], done.stdout)


def _toml(value: object) -> str:
    return json.dumps(value)


def make_environment(home: Path) -> dict[str, str]:
    """Environment of an isolated Flower."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
