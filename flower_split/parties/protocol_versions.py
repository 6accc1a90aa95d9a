"""Which versions of the client-trunk protocol a party speaks, and what to upgrade where two share none.

A fingerprint's ``protocol`` is one number, or the oldest and the newest of a range: ``2`` or ``2-3``.
Parties whose ranges overlap work together, so that a federation can be upgraded machine by machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

FIELD = "protocol"
"""Its name in a fingerprint."""
_TEXT = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ProtocolVersions:
    """A range of versions; both ends belong to it."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        """Return it as a fingerprint has it."""
        return f"{self.oldest}" if self.oldest == self.newest else f"{self.oldest}-{self.newest}"

    @classmethod
    def of(cls, fingerprint: Mapping[str, str]) -> "ProtocolVersions | None":
        """Return what a fingerprint says; None: nothing that can be read."""
        found = _TEXT.fullmatch(fingerprint.get(FIELD, ""))
        if found is None:
            return None
        oldest, newest = int(found[1]), int(found[2] or found[1])
        return cls(oldest, newest) if oldest <= newest else None

    def meets(self, other: "ProtocolVersions") -> bool:
        """Return whether both speak a version that is the same."""
        return max(self.oldest, other.oldest) <= min(self.newest, other.newest)


SPOKEN = ProtocolVersions(2, 2)
"""What this version of the package speaks."""


def protocols_meet(mine: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Return whether the parties of two fingerprints can speak with each other."""
    one, other = ProtocolVersions.of(mine), ProtocolVersions.of(theirs)
    if one is None or other is None:
        return mine.get(FIELD) == theirs.get(FIELD)
    return one.meets(other)


def protocol_problem(
    mine: Mapping[str, str], theirs: Mapping[str, str], labels: tuple[str, str]
) -> str:
    """Return a sentence that says which party is too old; empty: they can speak with each other.

    Args:
        mine: One party's fingerprint.
        theirs: The other's.
        labels: What the two are called, such as ``the trunk``.
    """
    if protocols_meet(mine, theirs):
        return ""
    one, other = ProtocolVersions.of(mine), ProtocolVersions.of(theirs)
    if one is None or other is None:
        remedy = "Install the same version of flower-split for both"
    else:
        remedy = f"Upgrade flower-split of {labels[0] if one.newest < other.oldest else labels[1]}"
    return (
        f"{labels[0]} speaks protocol {one or 'of an unknown version'}, "
        f"{labels[1]} {other or 'one of an unknown version'}. {remedy}."
    )
