"""Where a training round stands."""

from enum import Enum


class Phase(Enum):
    """Where a training round stands."""

    JOINING = "joining"
    OPEN = "open"
    DONE = "done"
    ABORTED = "aborted"
