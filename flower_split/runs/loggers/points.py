"""The numbers of ``metrics.jsonl`` as named curves."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flower_split.runs.files import Json
from flower_split.runs.loggers.logger import Record

_NO_CURVE = frozenset({"server_round", "partition_id", "step", "trained_by", "order", "dispatch"})


@dataclass(frozen=True, slots=True)
class Point:
    """One number of one curve."""

    curve: str  # such as "step/loss/client-0" or "round/perplexity"
    value: float
    at: int  # the server round; of a curve of steps, the client's step from 1, over all rounds


class Curves:
    """Turns lines into points, in the order of lines."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()  # partition -> steps so far

    def points(self, record: Record) -> list[Point]:
        """Return the finite numbers of one line.

        Curves are named ``kind/field``, a client's with ``/client-N`` behind. Numbers that are null, and
        what is no number, make no point; neither does the local-only baseline, which is no round's.
        """
        kind, partition = str(record.get("kind")), record.get("partition_id")
        if record.get("local_only") or record.get("phase") == "baseline":
            return []
        at = record.get("server_round")
        assert isinstance(at, int)  # append_metric has made sure
        client = f"/client-{partition}" if isinstance(partition, int) else ""
        if kind == "step" and isinstance(partition, int):
            self._steps[partition] += 1
            at = self._steps[partition]
        metrics = record.get("metrics")
        named: Mapping[str, Json] = metrics if isinstance(metrics, Mapping) else {}
        return [
            Point(f"{kind}/{name}{client}", float(value), at)
            for name, value in {**record, **named}.items()
            if name not in _NO_CURVE
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ]
