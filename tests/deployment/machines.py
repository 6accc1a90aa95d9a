"""Processes that stand for machines: the trunk's, and that of a job with its clients."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from flower_split.errors import TrunkError
from flower_split.protocol.values import TrunkStatus
from flower_split.server.coordinator import TrunkCoordinator
from tests.deployment.gate import Gate
from tests.support.flower_home import BIN, end, free_port, make_environment, processes_of

_PAUSE = 0.2  # seconds between two looks
_SAID = re.compile(r"\x1b\[[0-9;]*m")  # colours


class Process:
    """One process with its output, every line with the time at which it came."""

    def __init__(self, home: Path, env: Mapping[str, str], *command: str) -> None:
        self.lines: list[tuple[float, str]] = []
        self._child = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=dict(env),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as stream:
            for line in stream:
                self.lines.append((time.monotonic(), _SAID.sub("", line.rstrip())))

    @property
    def text(self) -> str:
        """All that it has said."""
        return "\n".join(line for _, line in list(self.lines))

    def said(self, pattern: str, since: float = 0.0) -> tuple[float, str] | None:
        """Return when it first said ``pattern`` after ``since``, and the line; None: not yet."""
        found = re.compile(pattern)
        return next((x for x in list(self.lines) if x[0] >= since and found.search(x[1])), None)

    def wait_said(self, pattern: str, seconds: float, since: float = 0.0) -> tuple[float, str]:
        """Wait for ``pattern``."""
        wait(
            lambda: self.said(pattern, since) is not None,
            seconds,
            f"{pattern!r}: {self.text[-4000:]}",
        )
        found = self.said(pattern, since)
        assert found is not None
        return found

    def kill_machine(self) -> None:
        """End it and all that it started, as when its machine loses power."""
        for pid in [*descendants(self._child.pid), self._child.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(30)

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def clients(self) -> list[int]:
        """Return the processes of a local run's clients, in their order."""
        found = descendants(self._child.pid)
        return sorted(pid for pid in found if not descendants(pid))

    def wait(self, seconds: float) -> int:
        """Wait for its end, and return its exit code."""
        code = self._child.wait(seconds)
        self._reader.join(10)
        return code


class Machines:
    """All processes of one deployment; ends them by id.

    Args:
        home: A folder of its own.
        app: The app's directory.
    """

    def __init__(self, home: Path, app: Path) -> None:
        self.home, self.app = home, app
        home.mkdir(parents=True)
        self.env = make_environment(home)
        self._trunk_port = free_port()
        self.token = home / "trunk.token"
        self.gate = Gate(self._trunk_port)
        self.trunk: Process | None = None
        self.ca = ""  # that signed the trunk's certificate; empty: it speaks plain text

    def __enter__(self) -> Self:
        """Start everything."""
        self.start_trunk()
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.gate.close()
        end(processes_of(self.home))

    def start_trunk(self, failpoints: str = "", *options: str) -> None:
        """Start the trunk, with what it wrote before."""
        env = {**self.env, "FLOWER_SPLIT_FAILPOINTS": failpoints}
        self.trunk = Process(
            self.home, env, "flower-split", "trunk", str(self.app), "--listen",
            f"127.0.0.1:{self._trunk_port}", "--token-file", str(self.token),
            "--checkpoints", str(self.home / "checkpoints"), *options,
        )  # fmt: skip
        self.trunk.wait_said("trunk serves on", 240)

    def start(self, *command: str) -> Process:
        """Start a command of this environment."""
        return Process(self.home, self.env, *command)

    def submit(self, run: Path, *options: str, config: str = "") -> Process:
        """Start ``flower-split run`` with this trunk, which it reaches over the link that can be cut."""
        values = (
            f"trunk.address={json.dumps(f'127.0.0.1:{self.gate.port}')} "
            f"trunk.token-file={json.dumps(str(self.token))} run-dir={json.dumps(str(run))} "
            f"trunk.root-certificates={json.dumps(self.ca)} {config}"
        )
        return self.job(*options, "--run-config", values)

    def job(self, *options: str) -> Process:
        """Start ``flower-split run`` of the app."""
        return self.start("flower-split", "run", str(self.app), "--local", "--stream", *options)

    def status(self) -> TrunkStatus | None:
        """Return where the trunk stands; None: it does not answer."""
        coordinator = TrunkCoordinator(
            f"127.0.0.1:{self._trunk_port}",
            self.token.read_text().strip(),
            timeout=2.0,
            root_certificates=self.ca,
        )
        try:
            return coordinator.status()
        except TrunkError:
            return None
        finally:
            coordinator.close()

    def in_round(self, number: int, joined: int = 0) -> bool:
        """Return whether a training round is open, and so many clients are in."""
        status = self.status()
        return (
            status is not None
            and status.server_round == number
            and status.phase in ("joining", "open")
            and sum(slot.joined for slot in status.slots) >= joined
        )


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds.

    Raises:
        TimeoutError: It does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(_PAUSE)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found
