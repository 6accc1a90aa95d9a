"""``flower-split watch``: a run's page in the browser while the run goes on."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.cli.interrupts import Interrupts
from flower_split.errors import ConfigError
from flower_split.results.report.live_page import LivePage, PageServer
from flower_split.runtime.exit_codes import COMPLETED

_WAIT_SECONDS = 3600.0  # a signal ends the wait at once


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchCommand:
    """What the command line asks for."""

    runs: Sequence[Path]
    port: int = 0  # 0: any free one
    seconds: float = 5.0  # from one look to the next


def watch(command: WatchCommand) -> int:
    """Serve the page until Ctrl-C or SIGTERM, and return the exit code.

    Raises:
        ConfigError: The port cannot be had, the extra ``report`` is missing, or a number is wrong.
        RunDirectoryError: One is no run directory.
    """
    if command.seconds <= 0:
        raise ConfigError(f"--every must be above 0 seconds; it is {command.seconds:g}.")
    page = LivePage([run.expanduser() for run in command.runs], command.seconds)
    try:
        server = PageServer(page, command.port)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {command.port} cannot be had: {error}. Leave it out for a free one."
        ) from error
    with Interrupts() as interrupts, server:
        threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
        print(f"watching at {server.address}, until Ctrl-C", flush=True)
        while not interrupts.wait(_WAIT_SECONDS):
            pass
        server.shutdown()
        print("no longer watching; the run goes on", flush=True)
    return COMPLETED
