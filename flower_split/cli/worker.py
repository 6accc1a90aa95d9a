"""``flower-split worker``: show the workers of this user's nodes, or end them."""

from pathlib import Path

from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.state import WorkerState, ask_worker
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


def _line(state: WorkerState, end: bool) -> str:
    at = "has worked on a message for" if state.busy else "has waited for a message for"
    after = ""
    if end:
        after = "; it ends when it has answered" if state.busy else "; it ends"
    return (
        f"node {state.node}: process {state.pid}, run {state.run}, {state.answered} messages answered, "
        f"{at} {state.seconds:.0f} s{after}"
    )
