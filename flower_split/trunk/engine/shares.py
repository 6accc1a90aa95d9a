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


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What one client may take of a round; the trunk's own configuration says it."""

    evaluations: int = 0  # trunk.max-evaluations: in a training round

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
