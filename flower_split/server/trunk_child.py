"""The process that serves a run's trunk, as the ServerApp's side sees it."""

from typing import IO, Protocol


class TrunkChild(Protocol):
    """Does what ``python -m flower_split.trunk.serve`` does, with the words of :class:`subprocess.Popen`.

    It reads its order as one line from ``stdin``, answers with one on ``stdout``, logs on ``stderr``,
    and ends when ``stdin`` does.
    """

    stdin: IO[str] | None
    stdout: IO[str] | None
    stderr: IO[str] | None

    @property
    def returncode(self) -> int | None:
        """Return how it ended, as :meth:`poll` or :meth:`wait` saw last; None: it runs."""

    def poll(self) -> int | None:
        """Return how it ended; None: it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """

    def kill(self) -> None:
        """End it by force."""
