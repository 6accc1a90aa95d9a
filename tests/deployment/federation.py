"""Processes that stand for a whole deployment: SuperLink, SuperNodes and trunk, all over TLS."""

import json
import shutil
from pathlib import Path
from typing import Self

from tests.deployment.machines import Machines, Process
from tests.support.flower_home import BIN, Flower, free_port

NAMES = ("clinic-a", "clinic-b")
SECONDS_REFUSED = 65.0  # that a SuperLink refuses the successor of a SuperNode that was killed


class Deployed(Machines):
    """The machines of the deployment guide, each started with the guide's own options."""

    def __init__(self, home: Path, app: Path) -> None:
        super().__init__(home, app)
        self.certificates = home / "certificates"
        self.ca = str(self.certificates / "ca.crt")
        self._link_port = free_port()
        self.superlink: Process | None = None
        self.nodes: dict[str, Process] = {}

    def __enter__(self) -> Self:
        """Make certificates, start everything, and register the SuperNodes' keys."""
        clients = [word for name in NAMES for word in ("--client", name)]
        self._run("flower-split", "certs", str(self.certificates), "--host", "127.0.0.1", *clients)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "hospital"\n\n[superlink.hospital]\n'
            f'address = "127.0.0.1:{self._link_port}"\n'
            f"root-certificates = {json.dumps(self.ca)}\n"
        )
        pair = [str(self.certificates / f"server.{end}") for end in ("crt", "key")]
        self.start_trunk("", "--tls-certificate", pair[0], "--tls-key", pair[1])
        self.start_superlink()
        for name in NAMES:
            self._run(
                *("flwr", "supernode", "register"),
                *(str(self.certificates / f"{name}.node.pub"), "hospital"),
            )
        return self

    def _run(self, *command: str) -> None:
        done = Flower(self.home, self.env).command(*command, timeout=240)
        assert done.returncode == 0, done.stdout

    def start_superlink(self) -> None:
        """Start the SuperLink, with the database that it had before."""
        self.superlink = self.start(
            *("flower-superlink", "--ssl-ca-certfile", self.ca),
            *("--ssl-certfile", str(self.certificates / "server.crt")),
            *("--ssl-keyfile", str(self.certificates / "server.key")),
            *("--enable-supernode-auth", "--database", str(self.home / "state.db")),
            *("--host", "127.0.0.1", "--port", str(self._link_port)),
        )
        self.superlink.wait_said("Starting Flower SuperLink|Flower Deployment Runtime", 120)

    def start_node(self, name: str, *before: str) -> Process:
        """Start a clinic's SuperNode with its key; ``before`` stands before the command."""
        command = [
            *("flower-split", "supernode", "--root-certificates", self.ca),
            *("--superlink", f"127.0.0.1:{self._link_port}"),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--auth-supernode-private-key", str(self.certificates / f"{name}.node")),
            *("--node-config", f"partition-id={NAMES.index(name)} num-partitions={len(NAMES)}"),
        ]
        if before:
            command[0] = str(BIN / command[0])
        self.nodes[name] = self.start(*before, *command)
        return self.nodes[name]

    def job(self, *options: str) -> Process:
        """Start ``flower-split run`` of the app on the SuperLink."""
        return self.start("flower-split", "run", str(self.app), "hospital", "--stream", *options)


def shifted_clock() -> list[str]:
    """Return what starts a program whose clock is two hours ahead; empty: this machine has no faketime."""
    found = shutil.which("faketime")
    return [found, "-f", "+2h"] if found else []
