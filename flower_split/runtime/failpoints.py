"""Named places where a test makes this process fail; a place does nothing unless it is switched on.

A place is switched on by :func:`switch_on`, or for a process of its own by the environment variable
:data:`VARIABLE`, which the process's entry point reads once: ``name=action@hit`` items, separated by
commas. ``kill`` ends the process as SIGKILL does, ``raise`` raises an OSError, ``enospc`` raises
the one of a full disk. The action takes place once, at the hit named (from 1; 1 if left out), and
what has fired is remembered, so that a test can assert that its fault took place.
"""

import errno
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.errors import ConfigError

VARIABLE = "FLOWER_SPLIT_FAILPOINTS"

TRUNK_PLACES = (
    "trunk.forward.computed",
    "trunk.backward.accumulated",
    "trunk.step.before",
    "trunk.step.after",
    "trunk.prepare.before",
    "trunk.prepare.tensors-written",
    "trunk.prepare.written",
    "trunk.prepare.answering",
    "trunk.commit.before",
    "trunk.commit.after",
)
SERVER_PLACES = (
    "server.aggregate.before",
    "server.commit.before",
    "server.commit.tensors-written",
    "server.commit.manifest-written",
    "server.commit.after",
)
CLIENT_PLACES = ("client.train.begin", "client.train.end")
FILE_PLACES = ("file.write.half", "file.write.before-rename", "file.write.after-rename")
PLACES = TRUNK_PLACES + SERVER_PLACES + CLIENT_PLACES + FILE_PLACES
_ACTIONS = ("kill", "raise", "enospc")


@dataclass(slots=True)
class _Switch:
    action: str
    at: int
    hits: int = 0
    fired: bool = False


_lock = threading.Lock()
_switches: dict[str, _Switch] = {}
armed: Mapping[str, object] = _switches
"""The places that are switched on, for code that runs every step: it asks here before :func:`reach`."""


def reach(name: str) -> None:
    """Note that the program has come to the place ``name``, and act if it is armed.

    Raises:
        OSError: A test has switched the place on to raise.
    """
    if not _switches:
        return
    with _lock:
        switch = _switches.get(name)
        if switch is None or switch.fired:
            return
        switch.hits += 1
        if switch.hits < switch.at:
            return
        switch.fired = True
    if switch.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if switch.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise OSError(errno.EIO, f"failpoint {name}")


def switch_on(name: str, action: str, at: int = 1) -> None:
    """Let ``name`` fail at its ``at``-th hit from now on.

    Raises:
        ConfigError: There is no such place or action.
    """
    if name not in PLACES or action not in _ACTIONS or at < 1:
        raise ConfigError(
            f"a failpoint is one of {', '.join(PLACES)} with an action of {', '.join(_ACTIONS)} at "
            f"a hit from 1; it is {name}={action}@{at}."
        )
    with _lock:
        _switches[name] = _Switch(action, at)


def switch_on_from(text: str) -> None:
    """Switch on what the value of :data:`VARIABLE` names.

    Raises:
        ConfigError: It cannot be read.
    """
    for item in filter(None, text.split(",")):
        name, _, rest = item.partition("=")
        action, _, at = rest.partition("@")
        switch_on(name.strip(), action, int(at) if at.isdigit() else 1)


def fired() -> set[str]:
    """Return the places whose action has taken place in this process."""
    with _lock:
        return {name for name, switch in _switches.items() if switch.fired}


def reset() -> None:
    """Switch everything off."""
    with _lock:
        _switches.clear()
