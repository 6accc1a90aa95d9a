"""A process that waits to become the trunk of a local run.

It is forked from one that has loaded every module, so that the trunk serves once it has its model; a
process of its own would load torch and transformers first, ten seconds of a core.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from typing import IO

from flower_split.local.nodes import NodeProcess
from flower_split.runtime.closing import Closing
from flower_split.trunk.serve import main

_END_SECONDS = 10.0  # for a trunk whose input has ended


class ForkedTrunk(Closing):
    """The process, in the words of :class:`flower_split.server.trunk_child.TrunkChild`.

    Made by :meth:`fork`.
    """

    def __init__(self, process: ForkProcess, ends: tuple[int, int, int]) -> None:
        self._process = process
        self.stdin: IO[str] | None = os.fdopen(ends[0], "w", encoding="utf-8")
        self.stdout: IO[str] | None = os.fdopen(ends[1], encoding="utf-8")
        self.stderr: IO[str] | None = os.fdopen(ends[2], encoding="utf-8", errors="replace")

    @classmethod
    def fork(cls, nodes: Sequence[NodeProcess]) -> "ForkedTrunk":
        """Fork the process. Call it before this process starts a thread or uses torch.

        Args:
            nodes: Processes forked before, whose connections the new one must not hold.
        """
        order, answer, log = os.pipe(), os.pipe(), os.pipe()
        mine = order[1], answer[0], log[0]
        theirs = order[0], answer[1], log[1]
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, mine, nodes), name="trunk", daemon=True
        )
        process.start()
        for end in theirs:
            os.close(end)
        return cls(process, mine)

    @property
    def returncode(self) -> int | None:
        """Return how it ended; None: it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return how it ended; None: it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It still runs.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("trunk", timeout or 0.0)
        return code

    def kill(self) -> None:
        """End it by force."""
        self._process.kill()

    def close(self) -> None:
        """End it, where it never got an order; whoever gave it one ends it, and reads its log."""
        unused = self.stdin is not None and not self.stdin.closed
        pipes = (self.stdin, self.stdout, self.stderr) if unused else (self.stdin, self.stdout)
        if self.stdin is not None:
            self.stdin.close()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        for pipe in pipes:
            if pipe is not None:
                pipe.close()


def _serve(
    ends: tuple[int, int, int], not_mine: Sequence[int], nodes: Sequence[NodeProcess]
) -> None:
    """Be a trunk, as ``python -m flower_split.trunk.serve`` is one, until the input ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for node in nodes:
        node.tell_to_end()  # closes this process's copy, which would keep the node waiting
    for end in not_mine:
        os.close(end)
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    package = logging.getLogger("flower_split")
    for logger in (package, logging.getLogger()):
        logger.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)
    code = main()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)
