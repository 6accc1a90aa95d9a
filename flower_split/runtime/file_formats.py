"""Numbers of file formats: a file says how it is to be read, and what is too new is refused in words."""

from dataclasses import dataclass
from pathlib import Path

from flower_split.runtime.version import __version__


@dataclass(frozen=True, slots=True)
class FileFormat:
    """The form of one kind of file.

    The number goes up where this version's readers would misread what they wrote before, or readers of
    that time what is written now. A file without a number has number 0: files had none at first.
    """

    number: int  # of what is written
    oldest: int  # that is read still

    def problem(self, path: Path, found: object) -> str:
        """Return why a file cannot be read, with the remedy; empty: it can.

        Args:
            path: The file.
            found: The number that the file says.
        """
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            return f"{path} is damaged: its format should be a number. Restore the file."
        if self.oldest <= found <= self.number:
            return ""
        reads = (
            f"{self.number}" if self.oldest == self.number else f"{self.oldest} to {self.number}"
        )
        age, remedy = "newer", "Upgrade flower-split here"
        if found < self.oldest:
            age, remedy = "older", "Go on with the version that wrote it, or begin a new run"
        return (
            f"{path} has format {found}, and flower-split {__version__} reads format {reads}: {age} "
            f"flower-split wrote it. {remedy}."
        )
