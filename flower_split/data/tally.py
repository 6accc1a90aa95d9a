"""Counts of what a client's data was used for and what was left out, and the rule for bad records.

Nothing is dropped in silence: whatever is left out is counted here, and the counts travel to the
ServerApp, which shows them in its progress and its report.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from flower_split.errors import DataError

logger = logging.getLogger(__name__)

_PLACES_LOGGED = 5  # of bad records; the rest is only counted


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCounts:
    """What one client has of its data; counts are of records unless they say otherwise."""

    records: int = 0  # of this client's share, and of data.eval-path, read and understood
    bad_records: int = 0  # left out by data.on-bad-record = "skip"
    blank_records: int = 0  # text without anything but white space
    unassigned_records: int = 0  # of the whole data set: in no client's share
    near_duplicates: int = 0  # held-out documents left out, as training text covers them
    tested_records: int = 0  # training documents left out, as data.eval-path holds them out
    train_examples: int = 0
    eval_examples: int = 0
    cut_examples: int = 0  # longer than train.sequence-length
    cut_tokens: int = 0  # that these lost

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, int]) -> "DataCounts":
        """Return the counts that :meth:`as_dict` gave; names it does not know are passed over."""
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})

    def __add__(self, other: "DataCounts") -> "DataCounts":
        """Return the sums."""
        mine, its = self.as_dict(), other.as_dict()
        return DataCounts(**{name: mine[name] + its[name] for name in mine})

    def losses(self) -> list[str]:
        """Return what was left out, as parts of a sentence; empty if nothing was."""
        named = (
            (self.bad_records, "bad records were left out (data.on-bad-record)"),
            (self.blank_records, "blank records were passed over"),
            (self.unassigned_records, "records are in no client's share (data.on-unassigned)"),
            (self.near_duplicates, "held-out documents repeat training text and were left out"),
            (self.tested_records, "training documents are in data.eval-path and were left out"),
            (
                self.cut_examples,
                f"examples were longer than train.sequence-length and lost {self.cut_tokens} tokens",
            ),
        )
        return [f"{count} {what}" for count, what in named if count]


@dataclass(slots=True)
class Tally:
    """Count while one client's data is read; one per client, not shared between threads."""

    skip_bad_records: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def bad(self, error: DataError) -> None:
        """Count a record that cannot be used, or raise ``error`` where none may be left out."""
        if not self.skip_bad_records:
            raise error
        self.add("bad_records")
        if self.counts["bad_records"] <= _PLACES_LOGGED:
            logger.warning("a record is left out (data.on-bad-record = skip): %s", error)

    def add(self, name: str, count: int = 1) -> None:
        """Count ``count`` more of a field of :class:`DataCounts`."""
        self.counts[name] = self.counts.get(name, 0) + count

    def result(self) -> DataCounts:
        """Return the counts so far."""
        return DataCounts(**self.counts)
