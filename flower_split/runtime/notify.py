"""Tell systemd where a service stands (``Type=notify``); outside of it, nothing happens."""

import os
import socket
from collections.abc import Mapping

VARIABLE = "NOTIFY_SOCKET"


def notify(state: str, environment: Mapping[str, str] | None = None) -> bool:
    """Send one message of the service manager's protocol, such as ``READY=1``.

    Args:
        state: Assignments, one on each line.
        environment: Where the socket is named; None: this process's.

    Returns:
        Whether there is a service manager that was told.
    """
    address = (os.environ if environment is None else environment).get(VARIABLE, "")
    if not address:
        return False
    if address.startswith("@"):  # a name without a file
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:  # the manager has gone; the service goes on
            return False
    return True
