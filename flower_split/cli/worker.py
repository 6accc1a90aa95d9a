"""``flower-split worker``: show the workers of this user's nodes, end them, or start one beforehand."""

from functools import partial
from pathlib import Path

from flower_split.client.worker.asking import Starter, launch, start_worker
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.identity import WorkerIdentity
from flower_split.client.worker.state import WorkerState, ask_worker
from flower_split.errors import ConfigError, WorkerError
from flower_split.runtime.exit_codes import COMPLETED, FAILED


def show_workers(node: int | None = None, *, end: bool = False, folder: Path | None = None) -> int:
    """Print a line for each worker; return the exit code.

    Args:
        node: Flower's id of one node; None: all that have one.
        end: Tell them to end.
        folder: Where workers are met; None: in Flower's home.

    Raises:
        WorkerError: The folder is not this user's alone, or a worker does not answer.
    """
    with WorkerDirectory.open(folder) as directory:
        nodes = directory.nodes() if node is None else [node]
        asked = (ask_worker(directory, one, end=end) for one in nodes)
        found = [state for state in asked if state is not None]
        for state in found:
            print(_line(state, end))
        if not found:
            where = "" if node is None else f" of node {node}"
            print(f"there is no worker{where} at {directory.path}")
    return COMPLETED if found or node is None else FAILED


def start_beforehand(
    node: int | None, *, idle: float, folder: Path | None = None, start: Starter | None = None
) -> int:
    """Start a node's worker before its first message; return the exit code.

    It loads torch and transformers, and becomes the worker of the run whose message comes first.

    Args:
        node: Flower's id of the node.
        idle: Seconds without a message after which it ends.
        folder: The directory in which workers are met; None: that of Flower's home.
        start: Starts the process; None: with this one's environment.

    Raises:
        ConfigError: No node is named.
        WorkerError: It has a worker, or none can be started.
    """
    if node is None:
        raise ConfigError(
            "--start needs the node's id: flower-split worker NODE --start. Its SuperNode's log has it, "
            "and flwr supernode list."
        )
    with WorkerDirectory.open(folder) as directory:
        lock = directory.lock(node)
        if lock is None:
            raise WorkerError(
                f"node {node} has a worker. Look at it: flower-split worker {node}; --end ends it."
            )
        starter = start or partial(start_worker, idle=idle)
        launch(directory, node, WorkerIdentity.waiting(), lock, starter)
    print(f"node {node}: a worker waits for the first message, {idle:g} s at most")
    return COMPLETED


def _line(state: WorkerState, end: bool) -> str:
    at = "has worked on a message for" if state.busy else "has waited for a message for"
    run = f"run {state.run}" if state.run else "no run yet"
    after = ""
    if end:
        after = "; it ends when it has answered" if state.busy else "; it ends"
    return (
        f"node {state.node}: process {state.pid}, {run}, {state.answered} messages answered, "
        f"{at} {state.seconds:.0f} s{after}"
    )
