"""Flower's SuperNode, which looks for messages more often while a run goes on.

Flower's asks the SuperLink again three seconds after it has found no message, and looks for its own app's
reply twice a second: a round of a few seconds waits about as long for its messages. There is no option for
it, so the clock of that loop is exchanged; where a release of Flower has no such loop, nothing changes.
"""

import importlib
import sys
import time
from collections.abc import Callable

from flwr.supernode.cli.flower_supernode import flower_supernode

_LOOP = "flwr.supernode.start_client_internal"
_IDLE = (
    1.0  # Flower sleeps longer where there is no message, and shorter where it waits for a reply
)
_BUSY_SECONDS = 60.0  # after a message: so long another one is expected
_SHORTEST = 0.1  # seconds between two looks for a reply, which are this process's own
_SHORT = 0.3  # between two questions to the SuperLink


class Pace:
    """Stands for the module ``time`` in Flower's loop: pauses are shorter while a run goes on.

    Args:
        sleep: Waits so many seconds.
        now: Returns a time in seconds.
    """

    def __init__(
        self,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep, self._now = sleep, now
        self._busy_until = -1.0

    def sleep(self, seconds: float) -> None:
        """Wait as Flower asks to, or shorter."""
        now = self._now()
        if seconds < _IDLE:  # a message is being answered
            self._busy_until = now + _BUSY_SECONDS
            seconds = min(seconds, _SHORTEST)
        elif now < self._busy_until:
            seconds = min(seconds, _SHORT)
        self._sleep(seconds)

    def __getattr__(self, name: str) -> object:
        """Return whatever else the module has."""
        return getattr(time, name)


def main() -> None:
    """Run ``flower-supernode`` with this process's arguments."""
    loop = importlib.import_module(_LOOP)
    if getattr(loop, "time", None) is time:
        vars(loop)["time"] = Pace()
    flower_supernode()


if __name__ == "__main__":
    sys.argv[0] = "flower-supernode"
    main()
