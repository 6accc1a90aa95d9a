"""Flower's own command, ``flwr``: asked with a deadline, and its log stream as a queue of lines."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flower_split.errors import FederationError

ASK_SECONDS = 120.0  # of one command that does not follow a run; its imports take 10 s when busy
_END_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Where a run stands, as ``flwr ls`` tells it."""

    status: str  # pending, starting, running, finished:completed, :failed or :stopped
    details: str

    @property
    def ended(self) -> bool:
        """Return whether nothing of it runs any more."""
        return self.status.startswith("finished")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flwr:
    """The ``flwr`` that belongs to this interpreter, talking to one SuperLink.

    Args:
        connection: The connection's name in Flower's config.toml; empty: Flower's default.
        environment: Set on top of this process's own, such as FLWR_HOME.
        seconds: Deadline of one question.
    """

    connection: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = ASK_SECONDS

    def start_run(self, app: str, options: Sequence[str]) -> str:
        """Submit an app and return the run's id.

        Raises:
            FederationError: Flower does not take it, or does not answer.
        """
        arguments = ["run", app, *self._where, "--format", "json", *options]
        return str(self._ask(arguments, "start the run")["run-id"])

    def status(self, run_id: str) -> RunStatus:
        """Return where a run stands.

        Raises:
            FederationError: The SuperLink does not know it, or does not answer.
        """
        arguments = ["ls", *self._where, "--run-id", run_id, "--format", "json"]
        runs = self._ask(arguments, f"tell the status of run {run_id}").get("runs")
        if not isinstance(runs, list) or not runs:
            raise FederationError(f"Flower's SuperLink knows no run {run_id}. Check the run id.")
        return RunStatus(
            status=str(runs[0]["status"]), details=str(runs[0].get("status-details", ""))
        )

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            FederationError: It cannot be stopped (it has ended, for one), or nobody answers.
        """
        self._ask(["stop", run_id, *self._where, "--format", "json"], f"stop run {run_id}")

    @contextmanager
    def log(self, run_id: str) -> "Iterator[queue.Queue[str | None]]":
        """Stream a run's log from its beginning: a queue of lines, then None when it ends."""
        lines: queue.Queue[str | None] = queue.Queue()
        process = subprocess.Popen(
            self._command("log", run_id, *self._where, "--stream"),
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C is for this command alone
        )
        thread = threading.Thread(target=_read, args=(process, lines), daemon=True)
        thread.start()
        try:
            yield lines
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            thread.join(_END_SECONDS)
            if process.stdout is not None:
                process.stdout.close()

    @property
    def _where(self) -> list[str]:
        return [self.connection] if self.connection else []

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]

    def _ask(self, arguments: Sequence[str], what: str) -> dict[str, object]:
        """Run a command that answers in JSON."""
        try:
            done = subprocess.run(
                self._command(*arguments),
                env={**os.environ, **self.environment},
                capture_output=True,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                timeout=self.seconds,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(
                f"Flower was asked to {what} and did not answer within {self.seconds:g} s. Look "
                "whether the SuperLink answers, and whether this machine is overloaded; then try "
                "again."
            ) from error
        start = done.stdout.find("{")
        try:
            answer = json.loads(done.stdout[start:]) if start >= 0 else {}
        except ValueError:
            answer = {}
        if not isinstance(answer, dict) or not answer.get("success"):
            text = str(answer.get("error-message") or done.stderr or done.stdout)
            raise FederationError(
                f"Flower could not {what}: {' '.join(text.split()) or 'it gave no reason'}"
            )
        return answer


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    """Hand on a process's output, line by line, until it ends."""
    if process.stdout is not None:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
