"""``flower-split run``: ``flwr run`` with checks beforehand and a true outcome afterwards."""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.cli.constant import (
    LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE,
    LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE_IN_MEMORY,
)
from flwr.cli.flower_config import read_superlink_connection

from flower_split.cli.app_config import has_own_server_app, load_app_config, parse_overrides
from flower_split.cli.paths import as_run_config, path_overrides
from flower_split.cli.preflight import (
    check_aggregation,
    check_clients,
    check_model,
    check_trunk,
    simulation_settings,
)
from flower_split.errors import FederationError
from flower_split.runtime.logs import MARK

logger = logging.getLogger(__name__)

_LOCAL = (LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE, LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE_IN_MEMORY)
_ASK_SECONDS = 120.0  # of one flwr command that does not follow a run


def run_app(
    app: Path,
    *,
    superlink: str | None,
    run_config: Sequence[str] | None,
    federation_config: str | None,
    stream: bool,
    resume: Path | None = None,
) -> int:
    """Check, submit, follow, and tell the outcome.

    Args:
        app: The app's directory.
        superlink: Name of a SuperLink connection; None: Flower's default, a local simulation.
        run_config: Values of ``--run-config``.
        federation_config: ``--federation-config``; None: what the job needs.
        stream: Show every line of the log.
        resume: The directory of a run to go on with; None: a new run.

    Returns:
        0 if the run completed, 1 otherwise.

    Raises:
        FlowerSplitError: A check failed, or Flower did not take the run.
    """
    overrides = parse_overrides(run_config)
    if resume is not None:
        overrides["resume"] = str(resume.expanduser().absolute())
    config = load_app_config(app, [as_run_config(overrides)])
    check_aggregation(config)
    adapter, scales = check_model(config)
    check_trunk(config)
    where = [superlink] if superlink else []
    command = ["run", str(app), *where, "--format", "json"]
    if _is_local(superlink):
        settings = simulation_settings(config, federation_config)
        if not (has_own_server_app(app) or config.model.cuts_by_partition):
            check_clients(config, adapter, scales, settings)
        command += ["--federation-config", settings]
        overrides |= path_overrides(config, Path.cwd())
    elif federation_config:
        command += ["--federation-config", federation_config]
    if overrides:
        command += ["--run-config", as_run_config(overrides)]
    run_id = str(_ask(command, "start the run")["run-id"])
    try:
        _follow(run_id, where, stream)
    except KeyboardInterrupt:
        stop = " ".join(["flwr", "stop", run_id, *where])
        print(f"flower-split: run {run_id} goes on; end it with: {stop}", file=sys.stderr)
        return 1
    return _outcome(run_id, where)


def _is_local(superlink: str | None) -> bool:
    try:
        return read_superlink_connection(superlink).address in _LOCAL
    except SystemExit as error:  # how Flower's CLI reports: it has printed why
        raise FederationError(
            f"Flower's config.toml has no SuperLink connection {superlink!r}. Add a section "
            f"[superlink.{superlink}] with its address, or leave the name out."
        ) from error


def _flwr(*arguments: str) -> list[str]:
    """The command line of the ``flwr`` that belongs to this interpreter."""
    return [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]


def _ask(arguments: Sequence[str], what: str) -> dict[str, object]:
    """Run a flwr command that answers in JSON."""
    done = subprocess.run(
        _flwr(*arguments),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=_ASK_SECONDS,
        check=False,
    )
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


def _follow(run_id: str, where: Sequence[str], stream: bool) -> None:
    """Show the run's log until the run ends: every line, or this package's only."""
    print(f"run {run_id}", flush=True)
    with subprocess.Popen(
        _flwr("log", run_id, *where, "--stream"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if stream:
                print(line, end="", flush=True)
            elif line.startswith(MARK):
                print(line.removeprefix(MARK), end="", flush=True)
            elif line.strip() == MARK.strip():
                print(flush=True)


def _outcome(run_id: str, where: Sequence[str]) -> int:
    answer = _ask(["ls", *where, "--run-id", run_id, "--format", "json"], "tell the run's status")
    runs = answer["runs"]
    assert isinstance(runs, list)
    status, details = str(runs[0]["status"]), str(runs[0].get("status-details", ""))
    if status == "finished:completed":
        return 0
    text = " ".join(details.split()) or "Flower gave no details; see the log"
    if "flower_split" in text and ("import" in text.lower() or "No module" in text):
        text += (
            " The local SuperLink keeps the Python environment that first started it; end that "
            "process (flower-superlink) if it is another one than this, and run again."
        )
    print(f"flower-split: run {run_id} is {status}. {text}", file=sys.stderr)
    return 1
