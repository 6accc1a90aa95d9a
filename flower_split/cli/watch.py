"""``flower-split watch``: a run's page in the browser while the run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.results.report.live_page import LivePage, PageServer
from flower_split.runtime.exit_codes import COMPLETED


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchCommand:
    """What the command line asks for."""

    runs: Sequence[Path]
    port: int = 0  # 0: any free one
    seconds: float = 5.0  # from one look to the next


def watch(command: WatchCommand) -> int:
    """Serve the page until the command is interrupted, and return the exit code.

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
    with server:
        print(f"watching at {server.address}, until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("no longer watching; the run goes on", flush=True)
    return COMPLETED
