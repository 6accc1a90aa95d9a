"""Processes by their ids: who runs, who listens, and the end of a session."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"  # of the Linux kernel's tables of TCP sockets
_PS_SECONDS = 10.0


def start_of(pid: int) -> str | None:
    """Return when a process began, in the system's words; None where it does not run.

    A process id is given again to later processes; the two together are not.
    """
    if _PROC.is_dir():
        try:
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    done = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        timeout=_PS_SECONDS,
        check=False,
    )
    return done.stdout.strip() or None


def listens_on(pid: int, port: int) -> bool:
    """Return whether it is this process that listens on a TCP port; True where no system tells."""
    tables = [_PROC / str(pid) / "net" / name for name in ("tcp", "tcp6")]
    try:
        rows = [line.split() for table in tables if table.exists() for line in _lines(table)]
        wanted = {
            f"socket:[{row[9]}]"
            for row in rows
            if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port
        }
        held = _open_files(_PROC / str(pid))
    except OSError:
        return not _PROC.is_dir()
    return bool(wanted & held) or not tables[0].exists()


def listener_of(port: int) -> int | None:
    """Return a process of this user's that listens on a TCP port; None: there is none, or no telling."""
    if not _PROC.is_dir():
        return None
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            holds = any(name.startswith("socket:") for name in _open_files(entry))
        except OSError:  # another user's, or it has ended
            continue
        if holds and listens_on(int(entry.name), port):
            return int(entry.name)
    return None


def program_of(pid: int) -> str:
    """Return the path of a process's program, links not followed; empty: it has ended."""
    try:
        program = _words(pid, "cmdline")[0]
        settings = dict(word.partition("=")[::2] for word in _words(pid, "environ"))
    except OSError:
        return ""
    return shutil.which(program, path=settings.get("PATH")) or program


def _words(pid: int, file: str) -> list[str]:
    return (_PROC / str(pid) / file).read_bytes().decode(errors="replace").split("\0")


def kill_session(pid: int) -> None:
    """End at once whatever is left of the process group that ``pid`` leads or led."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _open_files(process: Path) -> set[str]:
    """Return what a process has open, as the kernel names it.

    Raises:
        OSError: It has ended, or is another user's.
    """
    found = set()
    for entry in (process / "fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def _lines(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:]
