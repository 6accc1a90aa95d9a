"""The processes of the job, forked from one that has everything imported, so that a restart is quick."""

import logging
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from flower_split.config import Scalar
from flower_split.runtime import failpoints

_fork = multiprocessing.get_context("fork")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(slots=True)
class Role:
    """One process of the job, started again whenever it ends by a signal."""

    name: str
    run: Callable[[], None]
    places: tuple[str, ...]  # failpoints that it passes
    process: BaseProcess | None = None
    failpoint: str = ""  # switched on in the running process
    kills: int = 0
    log: Path = field(default_factory=Path)

    def start(self, failpoint: str = "") -> None:
        """Fork it, with ``failpoint`` switched on."""
        self.failpoint = failpoint
        self.process = _fork.Process(target=self._main, args=(failpoint,), name=self.name)
        self.process.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Of the ended process; negative: the signal."""
        return None if self.process is None else self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()

    def _main(self, failpoint: str) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        logging.getLogger("flower_split").handlers.clear()
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {self.name} %(message)s")
        failpoints.switch_on_from(failpoint)
        self.run()


class Job:
    """Every process of one run, its directories and its configuration.

    Args:
        root: Of this run alone.
        config: Of the job; addresses and directories are filled in.
        dedupe: Whether the trunk remembers calls.
        supervised: The trunk is the ServerApp's own child, as in a simulation.
    """

    def __init__(
        self,
        root: Path,
        config: Mapping[str, Scalar],
        *,
        dedupe: bool = True,
        supervised: bool = False,
    ) -> None:
        root.mkdir(parents=True)
        self.root = root
        self.run_dir = root / "run"
        self.trunk_port = free_port()
        (root / "token").write_text(secrets.token_urlsafe(32))
        (root / "token").chmod(0o600)
        self.config: dict[str, Scalar] = {
            **config,
            "run-dir": str(self.run_dir),
            "trunk.token-file": str(root / "token"),
        }
        self.num_clients = int(config["num-clients"])
        # Linux's abstract names: a path under root could exceed what a socket's address holds.
        name = f"\0chaos-{os.getpid()}-{secrets.token_hex(4)}"
        self.nodes = {1000 + i: f"{name}-{i}" for i in range(self.num_clients)}
        self._dedupe = dedupe
        self.supervised = supervised
        files = failpoints.FILE_PLACES
        self.trunk = self._role("trunk", self._run_trunk, failpoints.TRUNK_PLACES + files)
        self.server = self._role("server", self._run_server, failpoints.SERVER_PLACES + files)
        self.clients = [
            self._role(f"client-{i}", self._client_runner(i), failpoints.CLIENT_PLACES)
            for i in range(self.num_clients)
        ]

    @property
    def roles(self) -> list[Role]:
        """All processes that are started here."""
        trunk = [] if self.supervised else [self.trunk]
        return [*trunk, self.server, *self.clients]

    def kill_child_trunk(self) -> bool:
        """SIGKILL the trunk that the ServerApp has started; False where it runs none now."""
        server = self.server.process
        for entry in Path("/proc").iterdir():
            if server is None or not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (OSError, ValueError):
                continue
            if parent == server.pid and b"flower_split.trunk.serve" in command:
                os.kill(int(entry.name), signal.SIGKILL)
                return True
        return False

    def _role(self, name: str, run: Callable[[], None], places: tuple[str, ...]) -> Role:
        return Role(name, run, places, log=self.root / f"{name}.log")

    def _run_trunk(self) -> None:
        from naive import let_numbers_repeat, switch_dedupe_off

        from flower_split.config import parse_run_config
        from flower_split.trunk.serve import RunningTrunk, Serving

        let_numbers_repeat()
        if not self._dedupe:
            switch_dedupe_off()
        serving = Serving(
            listen=f"127.0.0.1:{self.trunk_port}",
            token=(self.root / "token").read_text(),
            checkpoints=str(self.root / "trunk-checkpoints"),
        )
        with RunningTrunk(parse_run_config(self.config), serving):
            while True:
                signal.pause()

    def _run_server(self) -> None:
        from grid import ProcessGrid

        from flower_split.config import parse_run_config
        from flower_split.server import app as server_app

        config = dict(self.config)
        if (self.run_dir / "config.json").exists():
            config["resume"] = str(self.run_dir)
        elif self.run_dir.exists():
            shutil.rmtree(self.run_dir)  # it died before there was anything to go on with
        server_app.run(ProcessGrid(self.nodes), parse_run_config(config))

    def _client_runner(self, index: int) -> Callable[[], None]:
        def run() -> None:
            from grid import serve_node

            node = 1000 + index
            where = {"partition-id": index, "num-partitions": self.num_clients}
            serve_node(self.nodes[node], node, where, self.config)

        return run
