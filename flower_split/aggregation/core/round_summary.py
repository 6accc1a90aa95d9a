"""What a round's aggregation did, for progress and report."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """What a round's aggregation did.

    Args:
        clients: The ids whose updates were used, in the order of summation.
        excluded: Client id → why its update was left out (policy "exclude" only).
        seconds: Wall-clock time of the aggregation.
        unchanged: Modules that no client of the round held, which therefore stay as they were.
        truncation: As :meth:`AdapterAggregator.truncation` says afterwards.
    """

    clients: tuple[str | int, ...]
    excluded: Mapping[str | int, str] = field(default_factory=dict)
    seconds: float = 0.0
    unchanged: tuple[str, ...] = ()
    truncation: float = 0.0
