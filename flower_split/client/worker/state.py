"""What a worker says of itself to whoever asks; it answers at once, also at work."""

from dataclasses import dataclass

from flower_split.client.worker import frames
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.frames import Frame

_ASKING_SECONDS = 10.0  # for the answer


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerState:
    """What a worker says of itself."""

    pid: int
    node: int
    run: int
    answered: int  # messages
    busy: bool
    seconds: float  # since its message came, or since it answered the last one


def ask_worker(directory: WorkerDirectory, node: int, *, end: bool = False) -> WorkerState | None:
    """Return the state of a node's worker; None where there is none.

    Args:
        directory: Where workers are met.
        node: Flower's id of the node.
        end: Tell it to end, once it has answered the message that it computes.

    Raises:
        WorkerError: It does not answer.
    """
    connection = directory.connect(node, _ASKING_SECONDS)
    if connection is None:
        return None
    with connection:
        what = f"the state of node {node}'s worker"
        frames.send(connection, Frame("end" if end else "state"), _ASKING_SECONDS, what)
        said = frames.receive(connection, _ASKING_SECONDS, what)
    return WorkerState(
        pid=int(said.text("pid")),
        node=int(said.text("node")),
        run=int(said.text("run")),
        answered=int(said.text("answered")),
        busy=said.fields.get("busy") is True,
        seconds=float(said.text("seconds")),
    )
