"""The trunk as a child of this process: start it on loopback, supervise it, end it.

The child is ``python -m flower_split.trunk.serve``, or a process that was made ready to do the same; this
module knows nothing else of it. It gets its order as one JSON line on standard input and answers with
one on standard output.
"""

import json
import logging
import os
import secrets
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

from flower_split.config import RunConfig, resolved_run_config
from flower_split.errors import TrunkUnavailable
from flower_split.server.trunk_child import TrunkChild

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # between two polls of a supervised process
_TRIES = 3  # to start a process that has died


class TrunkProcess:
    """A trunk as a child process of this one, on loopback. Made by :meth:`start`.

    Attributes:
        address: ``127.0.0.1:port``.
        token: The coordinator's token; made for this run.
        given_up: It died, and could not be started again.
    """

    def __init__(self, process: TrunkChild, order: Mapping[str, object], timeout: float) -> None:
        self._process = process
        self._order = order
        self._timeout = timeout
        self._stopping = threading.Event()
        self._supervisor: threading.Thread | None = None
        self.given_up = False
        self.token = str(order["token"])
        self.address = str(order["listen"])

    @classmethod
    def start(
        cls,
        config: RunConfig,
        timeout: float,
        checkpoints: Path | None = None,
        ready: TrunkChild | None = None,
    ) -> Self:
        """Start the trunk that ``config`` describes and wait until it serves.

        Args:
            config: The run's configuration.
            timeout: Seconds until it must serve.
            checkpoints: The directory of its checkpoints; None: it keeps none.
            ready: The process that serves first; None: a new one.

        Raises:
            TrunkUnavailable: It did not start; carries the reason in words.
        """
        order = {
            "config": resolved_run_config(config),
            "token": secrets.token_urlsafe(32),
            "listen": "127.0.0.1:0",
            "checkpoints": str(checkpoints or ""),
        }
        process = ready or _new_process()
        port = _port_of(process, order, timeout)
        return cls(process, {**order, "listen": f"127.0.0.1:{port}"}, timeout)

    def restart(self) -> None:
        """Start the process again after it has died, at the same address and with the same token.

        Raises:
            TrunkUnavailable: It did not start.
        """
        self._end(0.0)
        logger.warning("the trunk process ended; restarting it")
        self._process = _new_process()
        _port_of(self._process, self._order, self._timeout)

    def supervise(self) -> None:
        """Restart it whenever it dies, until :meth:`close`.

        Callers that wait for the trunk meanwhile retry, and the new process tells them that their
        round is over. After three failed starts in a row, ``given_up`` is set.
        """
        # Only the supervisor replaces ``_process`` from here on; close() joins it before it ends
        # the process, so that none is started after the run.
        self._supervisor = threading.Thread(target=self._supervise, name="trunk-supervisor")
        self._supervisor.daemon = True
        self._supervisor.start()

    def _supervise(self) -> None:
        failures = 0
        while not self._stopping.wait(_POLL_SECONDS):
            if self.alive:
                continue
            try:
                self.restart()
                failures = 0
            except TrunkUnavailable as error:
                failures += 1
                logger.error("%s", error)
                if failures == _TRIES:
                    self.given_up = True
                    return

    @property
    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def close(self, timeout: float = 10.0) -> None:
        """End the process: by the end of its standard input, after ``timeout`` seconds by force."""
        self._stopping.set()
        if self._supervisor is not None:
            self._supervisor.join()
        self._end(timeout)

    def _end(self, timeout: float) -> None:
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # it is gone already
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            logger.warning("the trunk process did not end by itself within %g s", timeout)
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _new_process() -> TrunkChild:
    """Start a child, which waits for its order."""
    return subprocess.Popen(
        [sys.executable, "-m", "flower_split.trunk.serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )


def _port_of(process: TrunkChild, order: Mapping[str, object], timeout: float) -> int:
    """Give a child its order, and wait for its port.

    Raises:
        TrunkUnavailable: It does not serve; it has been ended.
    """
    assert process.stdin and process.stdout and process.stderr
    tail: deque[str] = deque(maxlen=20)
    relay = threading.Thread(target=_relay, args=(process.stderr, tail), daemon=True)
    relay.start()
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once; its answer, or its last log lines, say why
    answer = _read_answer(process.stdout, timeout)
    if "port" in answer:
        return int(str(answer["port"]))
    process.kill()
    process.wait()
    relay.join(timeout=5.0)
    for pipe in (process.stdin, process.stdout):
        pipe.close()
    why = answer.get("error") or " ".join(tail) or f"it ended with code {process.returncode}"
    if answer.get("late"):
        why = (
            f"it does not serve after {timeout:g} s (join-timeout); "
            + (f"its last line: {tail[-1]}" if tail else "it wrote nothing")
            + ". Raise join-timeout if the model is large"
        )
    raise TrunkUnavailable(f"the trunk process did not start: {str(why).rstrip('.')}.")


def _relay(lines: IO[str], tail: "deque[str]") -> None:
    """Pass the child's log on to this process's, whose output Flower streams to the user."""
    with lines:
        for line in lines:
            text = line.rstrip()
            if text:
                tail.append(text)
                # Its INFO lines repeat what the round loop says; a traceback has no level.
                level = logging.DEBUG if text.startswith("INFO ") else logging.WARNING
                logger.log(level, "trunk: %s", text)


def _read_answer(output: IO[str], timeout: float) -> Mapping[str, object] | dict[str, object]:
    """Return the child's one line, or ``{"late": True}``, or ``{}`` where it ended without one."""
    ready, _, _ = select.select([output], [], [], timeout)
    if not ready:
        return {"late": True}
    line = output.readline()
    try:
        answer = json.loads(line) if line.strip() else {}
    except ValueError:
        answer = {"error": f"its first line of output was not its answer: {line.strip()!r}"}
    return answer if isinstance(answer, dict) else {}
