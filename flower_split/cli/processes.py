"""Processes by their ids: who runs, who listens, and the end of a session."""

import os
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
        held = {os.readlink(entry) for entry in (_PROC / str(pid) / "fd").iterdir()}
    except OSError:
        return not _PROC.is_dir()
    return bool(wanted & held) or not tables[0].exists()


def kill_session(pid: int) -> None:
    """End at once whatever is left of the process group that ``pid`` leads or led."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _lines(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:]
