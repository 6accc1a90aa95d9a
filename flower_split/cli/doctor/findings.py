"""What an examination found, as values."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # a run may work; something about it will surprise
    PROBLEM = "problem"  # a run will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str  # such as "disk"
    level: Level
    text: str  # what was found
    remedy: str = ""  # what to do; empty where nothing is to be done


def ok(subject: str, text: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(subject, Level.OK, text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    """Return a finding that a run may survive."""
    return Finding(subject, Level.WARNING, text, remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Return a finding that stops a run."""
    return Finding(subject, Level.PROBLEM, text, remedy)
