"""Early stopping: whether a metric still improves, told from the run's own records.

Nothing is remembered between rounds, so a resumed run decides as if it had not been interrupted.
"""

import math
from collections.abc import Mapping, Sequence

from flower_split.config.early_stopping import EarlyStoppingConfig
from flower_split.runs.files import Json

Record = Mapping[str, Json]


def reason_to_stop(
    config: EarlyStoppingConfig, records: Sequence[Record], now: Mapping[int, float]
) -> str:
    """Return why the run ends; empty: it goes on.

    Args:
        config: The metric, and how patient to be.
        records: The lines of ``metrics.jsonl`` so far.
        now: What the last round measured, by round, where its line is not yet written; may be empty.
    """
    if not config.metric:
        return ""
    measured = {**measurements(config, records), **now}
    best, best_round, without = math.nan, 0, 0
    for server_round, value in sorted(measured.items()):
        if math.isnan(best) or _improves(config, value, best):
            best, best_round, without = value, server_round, 0
        else:
            without += 1
    if without < config.patience:
        return ""
    by = f" by more than {config.min_delta:g}" if config.min_delta else ""
    return (
        f"{config.metric} has not improved{by} in {without} measurements since round {best_round} "
        f"({best:.4g})"
    )


def measurements(config: EarlyStoppingConfig, records: Sequence[Record]) -> dict[int, float]:
    """Return the metric by round, as far as the lines have it; NaN where it was not finite."""
    found: dict[int, float] = {}
    for record in records:
        value = _value(config, record)
        number = record.get("server_round")
        if isinstance(number, int) and value is not _ABSENT:
            found[number] = float(value) if isinstance(value, int | float) else math.nan
    return found


_ABSENT = ""  # no line has a text there


def _value(config: EarlyStoppingConfig, record: Record) -> Json:
    if config.central_name:
        metrics = record.get("metrics") if record.get("kind") == "central" else None
        return (
            metrics.get(config.central_name, _ABSENT) if isinstance(metrics, Mapping) else _ABSENT
        )
    if record.get("kind") != "round":
        return _ABSENT
    return record.get(config.metric.replace("-", "_"), _ABSENT)


def _improves(config: EarlyStoppingConfig, value: float, best: float) -> bool:
    if config.goal == "min":
        return value < best - config.min_delta
    return value > best + config.min_delta
