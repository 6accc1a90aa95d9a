"""Where Flower keeps what is this user's on this machine."""

import os
from pathlib import Path


def flower_home() -> Path:
    """Return Flower's directory: ``$FLWR_HOME``, or ``~/.flwr``."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
