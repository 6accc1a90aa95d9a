"""The same app on a real SuperLink with two SuperNodes and a separately started trunk, on loopback."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flower_split.runs.directory import RunDirectory
from flower_split.server.federation.handshake import federation_config
from tests.processes.test_runs import adapters_of, digest
from tests.support.flower_home import BIN, Flower, end, free_port, make_environment, processes_of
from tests.support.tiny_app import make_app, make_data, make_model, tiny_config


class Deployment:
    """Processes of one deployment, ended by their ids."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = make_environment(home)
        self.logs: list[Path] = []
        self.services: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a service of this environment; its output goes to a file."""
        log = self.home / f"{len(self.logs)}-{command[0]}.log"
        self.logs.append(log)
        with log.open("w") as file:
            service = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.env,
                cwd=self.home,
                stdout=subprocess.PIPE if command[:2] == ("flower-split", "trunk") else file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        self.services.append(service)
        return service

    def close(self) -> None:
        """End everything, by id."""
        end(processes_of(self.home))
        for service in self.services:
            service.wait(timeout=10)
            if service.stdout is not None:
                service.stdout.close()

    def tails(self) -> str:
        """The ends of all logs, for a failure's message."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    home = tmp_path / "home"
    home.mkdir()
    deployment = Deployment(home)
    try:
        yield deployment
    finally:
        deployment.close()


def start_trunk(
    deployment: Deployment, app: Path, options: Sequence[str] = ()
) -> tuple["subprocess.Popen[str]", str, Path]:
    """``flower-split trunk``; returns its process, address and token file."""
    token = deployment.home / "trunk.token"
    process = deployment.start(
        "flower-split", "trunk", str(app), "--listen", "127.0.0.1:0", "--token-file", str(token)
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("trunk serves on "), deployment.tails()
    return process, line.split()[-1], token


@pytest.mark.timeout(1800)
@pytest.mark.slow  # a process for every message: two minutes on two idle cores
def test_deployment_with_a_separate_trunk_ends_on_the_adapters_of_the_simulation(
    deployment: Deployment, flower: Flower, tmp_path: Path
) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 2)
    config = tiny_config(model, data, train__local_steps=2, train__optimizer__name="adamw")

    port = free_port()
    superlink = f"127.0.0.1:{port}"
    (deployment.home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{superlink}"\n'
        "insecure = true\n"
    )
    deployment.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
    for partition in range(2):
        deployment.start(
            "flower-supernode",
            *("--insecure", "--superlink", superlink, "--host", "127.0.0.1"),
            *("--port", str(free_port())),
            *("--node-config", f"partition-id={partition} num-partitions=2"),
        )
    app = make_app(tmp_path / "app", {**config, "run-dir": str(tmp_path / "deployed")})
    trunk, address, token = start_trunk(deployment, app)
    assert os.stat(token).st_mode & 0o077 == 0

    done = Flower(deployment.home, deployment.env).command(
        *("flower-split", "run", str(app), "loopback", "--stream", "--run-config"),
        f"trunk.address={json.dumps(address)} trunk.token-file={json.dumps(str(token))}",
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + deployment.tails()
    deployed = RunDirectory.open(tmp_path / "deployed")

    trunk.send_signal(signal.SIGTERM)
    assert trunk.wait(timeout=30) == 0

    app = make_app(tmp_path / "app2", {**config, "run-dir": str(tmp_path / "simulated")})
    outcome = flower.run(app, {}, federation_config(2))
    assert outcome.status == "finished:completed", outcome.output
    simulated = RunDirectory.open(tmp_path / "simulated")
    assert digest(adapters_of(deployed)) == digest(adapters_of(simulated))
