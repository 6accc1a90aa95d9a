"""When the trunk takes an optimizer step: a value of the protocol and of the run configuration."""

from enum import Enum


class StepEvery(Enum):
    """What makes one trunk optimizer step (run config: ``trunk.step-every``)."""

    LOCAL_STEP = "local-step"
    """One window per local optimizer step, over all participants of the round."""
    SERVER_ROUND = "server-round"
    """One window per server round; participants need not run at the same time."""
    CONTRIBUTION = "contribution"
    """A step after every backward, in the order of arrival (SplitFed-V2, arXiv 2004.12088)."""
    BUFFER = "buffer"
    """One step per server round, over the arrivals that the coordinator names (asynchronous)."""
