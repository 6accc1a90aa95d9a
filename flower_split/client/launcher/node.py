"""Flower's SuperNode, which looks for messages more often while a run goes on.

Flower's asks the SuperLink again three seconds after it has found no message, and looks for its own app's
reply twice a second, and a round waits for both with each of its messages. There is no option for it, so
the clock of that loop is exchanged; where a release of Flower has no such loop, nothing changes.
"""

import importlib
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points

from flower_split.errors import ConfigError
from flower_split.runtime.flower_pulls import pull_sooner

SUPERNODE = "flower-supernode"
_LOOP = "flwr.supernode.start_client_internal"
# Seconds: Flower sleeps longer where there is no message, and shorter where it waits for a reply.
_IDLE = 1.0
_SHARE = 0.05  # of the time that is waited already: so long is the next pause
_SHORTEST = 0.05  # seconds
_LONGEST_FOR_REPLY = 0.1  # which this process has itself


class Pace:
    """Stands for the module ``time`` in Flower's loop: pauses are short after a message, and then longer.

    A minute after the last message the SuperLink is asked as often as Flower does.

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
        self._answered = now()  # when a message was last being answered

    def sleep(self, seconds: float) -> None:
        """Wait as Flower asks to, or shorter."""
        now = self._now()
        if seconds < _IDLE:  # a message is being answered
            self._answered = now
            pause = min(seconds, _LONGEST_FOR_REPLY)
        else:
            pause = min(seconds, max(_SHORTEST, _SHARE * (now - self._answered)))
        self._sleep(pause)

    def __getattr__(self, name: str) -> object:
        """Return whatever else the module has."""
        return getattr(time, name)


def main() -> None:
    """Run ``flower-supernode`` with this process's arguments.

    Raises:
        ConfigError: Flower's command is not installed beside this package.
    """
    exchange_clock(_LOOP)
    pull_sooner()
    sys.argv[0] = SUPERNODE
    flowers_command()()


def exchange_clock(module: str) -> bool:
    """Give Flower's loop the shorter pauses; return whether there is such a loop."""
    try:
        loop = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    if getattr(loop, "time", None) is not time:
        return False
    vars(loop)["time"] = Pace()
    return True


def flowers_command() -> Callable[[], object]:
    """Return what the console script ``flower-supernode`` runs.

    Raises:
        ConfigError: It is not installed beside this package.
    """
    for found in entry_points(group="console_scripts", name=SUPERNODE):
        command: Callable[[], object] = found.load()
        return command
    raise ConfigError(
        f"{SUPERNODE} is not there. Install Flower into this environment: pip install 'flwr>=1.41'."
    )


if __name__ == "__main__":
    main()
