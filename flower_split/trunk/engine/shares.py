"""How much of a round one client may take, and how much every client has taken.

Past a share a call is refused by the key of the limit, before anything is computed for it; what the
other clients have is not touched.
"""

from collections import Counter
from dataclasses import dataclass, field

from flower_split.errors import RefusalReason, TrunkRefused


@dataclass(slots=True)
class Usage:
    """What the slots have taken of a round. The engine's lock guards it."""

    received: Counter[int] = field(default_factory=Counter)  # bytes on the wire, by slot
    sent: Counter[int] = field(default_factory=Counter)
    evaluations: Counter[int] = field(default_factory=Counter)  # in a training round
    compute_seconds: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What one client may take of a round; the trunk's own configuration says it."""

    evaluations: int = 0  # trunk.max-evaluations: in a training round
    compute_seconds: float = 0.0  # trunk.max-compute-seconds; 0: no limit
    held_bytes: int = 4 << 30  # trunk.held-memory-per-client

    def take_evaluation(self, usage: Usage, slot: int) -> None:
        """Count an evaluation of ``slot`` in a training round. The engine's lock is held.

        Raises:
            TrunkRefused: It has made as many as it may (OVER_BUDGET).
        """
        if usage.evaluations[slot] >= self.evaluations:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"a client may make {self.evaluations} evaluations in a training round "
                f"(trunk.max-evaluations), and slot {slot} asks for one more. Evaluate in an "
                "evaluation round (evaluate-every), which takes any number, or raise the key at the "
                "trunk.",
            )
        usage.evaluations[slot] += 1

    def check_seconds(self, usage: Usage, slot: int) -> None:
        """Check that ``slot`` may compute. The engine's lock is held.

        Raises:
            TrunkRefused: Its calls have computed for as long as they may (OVER_BUDGET).
        """
        spent = usage.compute_seconds.get(slot, 0.0)
        if self.compute_seconds and spent >= self.compute_seconds:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"the calls of a client may compute for {self.compute_seconds:g} s in a round "
                f"(trunk.max-compute-seconds); those of slot {slot} have for {spent:.1f} s. Plan fewer "
                "steps, or raise the key at the trunk.",
            )
