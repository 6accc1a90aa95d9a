"""A SuperLink of the command's own: one process per run, on free ports, ended with it.

Flower's own local SuperLink listens on a fixed port and serves whoever asks, also from another
environment; it has 15 seconds to start, and one that is killed meanwhile leaves a database that no
later one can open. This one is started anew for every run, keeps its state in memory, has its Flower
home in the run directory (``flower/``), and has as long to start as a busy machine needs.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flower_split.cli import processes
from flower_split.cli.flwr import Flwr
from flower_split.errors import FederationError, RunDirectoryError
from flower_split.runs.files import FLOWER_FOLDER, read_json, write_json

START_SECONDS = 300.0
_PROBE_SECONDS = 1.0  # of one question for its health
_LOOK_SECONDS = 0.2
_END_SECONDS = 20.0
_TRIES = 3  # another process may take a port between its choice and its use
_CONNECTION = "own"
_STATE = "superlink.json"
_PORT_TAKEN = ("address already in use", "errno 98", "errno 48")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperLinkState:
    """What ``flower/superlink.json`` keeps, for ``flower-split attach``."""

    pid: int
    started: str  # tells the process from a later one with the same id
    port: int
    run_id: str = ""  # empty until Flower took the run


class LocalSuperLink:
    """A running SuperLink. Made by :meth:`start` or :meth:`find`.

    Args:
        folder: Its Flower home, in the run directory.
        state: Of its process.
        process: Where this command started it.
    """

    def __init__(
        self, folder: Path, state: SuperLinkState, process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self.folder = folder
        self.state = state
        self._process = process

    @classmethod
    def start(
        cls,
        run_directory: Path,
        *,
        seconds: float = START_SECONDS,
        given_up: Callable[[], bool] = lambda: False,
        program: Sequence[str] | None = None,
    ) -> "LocalSuperLink":
        """Start one for a run, and wait until it answers.

        Args:
            run_directory: The run's; the SuperLink's files go to its folder ``flower``.
            seconds: How long it may take.
            given_up: Asked while it starts; True ends it.
            program: The command line before the options; None: this environment's.

        Raises:
            RunDirectoryError: The run in that directory still goes on.
            FederationError: It does not start, or not in time; names its log.
        """
        folder = run_directory / FLOWER_FOLDER
        if (running := cls.find(run_directory)) is not None and running.alive:
            raise RunDirectoryError(
                f"the run in {run_directory} still goes on: its SuperLink is process "
                f"{running.state.pid}. Follow it with: flower-split attach {run_directory}"
            )
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run; it has ended
        folder.mkdir(mode=0o700, parents=True)
        deadline = time.monotonic() + seconds
        for attempt in range(1, _TRIES + 1):
            link = cls._launch(folder, program or _program())
            try:
                link._wait_until_it_answers(deadline, seconds, given_up)
                return link
            except FederationError:
                link.end()
                if attempt == _TRIES or not _port_was_taken(link.log):
                    raise
            except BaseException:
                link.end()
                raise
        raise AssertionError("the last try returns or raises")

    @classmethod
    def find(cls, run_directory: Path) -> "LocalSuperLink | None":
        """Return the SuperLink that a run was started with, alive or not; None where it had none.

        Raises:
            RunDirectoryError: Its file is damaged.
        """
        folder = run_directory / FLOWER_FOLDER
        if not (folder / _STATE).is_file():
            return None
        content = read_json(folder / _STATE)
        try:
            state = SuperLinkState(
                pid=int(str(content["pid"])),
                started=str(content["started"]),
                port=int(str(content["port"])),
                run_id=str(content["run_id"]),
            )
        except (KeyError, ValueError) as error:
            raise RunDirectoryError(
                f"{folder / _STATE} is damaged ({error!r}). Remove the folder {folder} once its "
                "SuperLink has ended."
            ) from error
        return cls(folder, state)

    @property
    def flwr(self) -> Flwr:
        """Return Flower's command for this SuperLink."""
        return Flwr(connection=_CONNECTION, environment={"FLWR_HOME": str(self.folder)})

    @property
    def log(self) -> Path:
        """Return the file that the SuperLink writes its log to."""
        return self.folder / "superlink.log"

    @property
    def run_log(self) -> Path:
        """Return the file for the log of the run itself."""
        return self.folder / "run.log"

    @property
    def alive(self) -> bool:
        """Return whether its process runs."""
        if self._process is not None:
            return self._process.poll() is None
        return processes.start_of(self.state.pid) == self.state.started

    def describe(self) -> str:
        """Return who it is, for people."""
        return f"process {self.state.pid} on 127.0.0.1:{self.state.port}, log {self.log}"

    def note_run(self, run_id: str) -> None:
        """Keep the run's id, for ``flower-split attach``."""
        self.state = replace(self.state, run_id=run_id)
        write_json(self.folder / _STATE, asdict(self.state))

    def end(self) -> None:
        """End the process and whatever of its session is left. Idempotent."""
        if self.alive:
            os.kill(self.state.pid, signal.SIGTERM)
            deadline = time.monotonic() + _END_SECONDS
            while self.alive and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
        if self._process is not None or self.alive:
            # Its session is the one that start() made, so this reaches nobody else.
            processes.kill_session(self.state.pid)
        if self._process is not None:
            self._process.wait()

    @classmethod
    def _launch(cls, folder: Path, program: Sequence[str]) -> "LocalSuperLink":
        port, control = _free_ports()
        config = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        config += f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        (folder / "config.toml").write_text(config, encoding="utf-8")
        options = ["--insecure", "--simulation", "--isolation", "subprocess"]
        options += ["--host", "127.0.0.1", "--port", str(port)]
        options += ["--control-api-address", f"127.0.0.1:{control}"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {"FLWR_HOME": str(folder), "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path}
        with open(folder / "superlink.log", "wb") as log:
            process = subprocess.Popen(
                [*program, *options],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # it outlives a Ctrl-C, and has a session to end it by
            )
        state = SuperLinkState(
            pid=process.pid, started=processes.start_of(process.pid) or "", port=port
        )
        write_json(folder / _STATE, asdict(state))
        return cls(folder, state, process)

    def _wait_until_it_answers(
        self, deadline: float, seconds: float, given_up: Callable[[], bool]
    ) -> None:
        while not (_is_healthy(self.state.port) and self._is_its_own_port()):
            if not self.alive:
                raise FederationError(
                    f"Flower's SuperLink ended while it started: {_last_lines(self.log)} "
                    f"Its log is {self.log}."
                )
            if given_up():
                raise FederationError("interrupted while Flower's SuperLink started; it was ended.")
            if time.monotonic() > deadline:
                raise FederationError(
                    f"Flower's SuperLink did not answer within {seconds:g} s; it was ended. Its "
                    f"log is {self.log}. Try again when this machine is less busy."
                )
            time.sleep(_LOOK_SECONDS)

    def _is_its_own_port(self) -> bool:
        """Return whether it is this process that listens, and nobody who took the port before."""
        return processes.listens_on(self.state.pid, self.state.port)


def _program() -> list[str]:
    code = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
    return [sys.executable, "-c", code]


def _free_ports() -> tuple[int, int]:
    """Return two ports that were free a moment ago."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _port_was_taken(log: Path) -> bool:
    text = log.read_text(encoding="utf-8", errors="replace").lower()
    return any(words in text for words in _PORT_TAKEN)


def _last_lines(log: Path, count: int = 3) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return json.dumps(" / ".join(said[-count:]), ensure_ascii=False) if said else "it said nothing."
