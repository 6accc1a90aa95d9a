"""``flower-split supernode``: Flower's own SuperNode, with a launcher beside it.

Flower starts the command ``flwr-clientapp`` for every message of a node, and finds it on the PATH. A
directory of this SuperNode's own comes first there, with a ``flwr-clientapp`` that hands the start over to
the launcher (:mod:`flower_split.client.launcher.serve`). This process then becomes Flower's SuperNode,
run by :mod:`flower_split.client.launcher.node`, with the same id: whoever supervises it sees one service.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flower_split.client.launcher import hand_over
from flower_split.client.launcher.node import SUPERNODE
from flower_split.client.worker.directory import WorkerDirectory
from flower_split.client.worker.identity import NODE_VARIABLE
from flower_split.errors import ConfigError, WorkerError
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY

CLIENTAPP = "flwr-clientapp"
_NODE = ("-P", "-m", "flower_split.client.launcher.node")
_POLL_VARIABLE, _POLL_SECONDS = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"  # Flower's own: 1 s
_BACKLOG = 16


def run_supernode(arguments: Sequence[str]) -> NoReturn:
    """Become Flower's SuperNode, whose ClientApp processes a launcher starts.

    Args:
        arguments: The options of ``flower-supernode``.

    Raises:
        ConfigError: Flower's commands are not installed beside this one, or the launcher cannot be
            started.
    """
    clientapp = _command(CLIENTAPP)
    folder = _own_folder()
    try:
        start_launcher(folder, clientapp, os.getpid())
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"the launcher of ClientApps cannot be started in {folder}: {error.strerror}. Set FLWR_HOME to "
            f"a directory where files may be made and run, or start {SUPERNODE} itself."
        ) from error
    environment = environment_with(folder, os.environ)
    environment[NODE_VARIABLE] = str(os.getpid())  # its own from then on
    os.execve(sys.executable, [sys.executable, *_NODE, *arguments], environment)


def environment_with(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a SuperNode's environment in which ``folder`` has its ``flwr-clientapp``."""
    path = os.pathsep.join((str(folder), environment.get("PATH", os.defpath)))
    return {_POLL_VARIABLE: _POLL_SECONDS, **environment, "PATH": path}


def start_launcher(folder: Path, clientapp: str, node: int) -> "subprocess.Popen[bytes]":
    """Write the folder's ``flwr-clientapp``, and start the launcher.

    Args:
        folder: Empty, of this user alone; the launcher removes it.
        clientapp: Flower's own command, for starts that the launcher does not take.
        node: Process id of the SuperNode, with which the launcher ends.

    Raises:
        OSError: The folder's files cannot be made or run.
    """
    command = folder / CLIENTAPP
    handing = (sys.executable, "-IS", hand_over.__file__, str(folder), clientapp)
    command.write_text(f'#!/bin/sh\nexec {shlex.join(handing)} "$@"\n', encoding="utf-8")
    command.chmod(0o700)
    if not os.access(command, os.X_OK):
        raise PermissionError(1, "files there may not be run (noexec)")
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(hand_over.address_in(opened))
        finally:
            os.close(opened)
        listener.listen(_BACKLOG)
        descriptor = listener.fileno()
        serve = ("-P", "-m", "flower_split.client.launcher.serve")
        given = (str(descriptor), str(node), str(folder))
        return subprocess.Popen(
            [sys.executable, *serve, *given], pass_fds=(descriptor,), stdin=subprocess.DEVNULL
        )


def _own_folder() -> Path:
    """Return a new directory of this user alone; its path is short enough for a socket."""
    try:
        with WorkerDirectory.open() as directory:
            parent = directory.path.parent / "launchers"
        parent.mkdir(PRIVATE_DIRECTORY, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="", dir=parent))
    except (OSError, WorkerError) as error:
        raise ConfigError(f"no directory can be made for the launcher: {error}") from error


def _command(name: str) -> str:
    """Return the path of a command of Flower's: beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(
            f"{name} is not there. Install Flower into this environment: pip install 'flwr>=1.41'."
        )
    return found
