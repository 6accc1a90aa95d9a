"""Where the clients' metrics go, beside the inner strategy: the recorder in a run, a list in a test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Record = Mapping[str, int | float | str]
"""One line of the metrics: an arrival that a round took, or a dispatch that was dropped."""

StepsSink = Callable[[int, int, Mapping[str, list[float]], Mapping[str, float]], None]
"""Receives ``(server_round, partition, per-step lists, metrics)`` of every accepted training reply."""

EvaluationSink = Callable[[int, int, Mapping[str, float]], None]
"""Receives ``(server_round, partition, metrics)`` of every evaluation reply."""

ArrivalsSink = Callable[[int, Sequence[Record]], None]
"""Receives ``(server_round, records)`` of an asynchronous round before it is committed: who arrived,
in this order, then who was dropped why."""


def _no_steps(
    server_round: int,
    partition_id: int,
    lists: Mapping[str, list[float]],
    metrics: Mapping[str, float],
) -> None:
    pass


def _no_evaluation(server_round: int, partition_id: int, metrics: Mapping[str, float]) -> None:
    pass


def _no_arrivals(server_round: int, records: Sequence[Record]) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSinks:
    """Where the clients' metrics go; by default nowhere."""

    steps: StepsSink = _no_steps
    evaluation: EvaluationSink = _no_evaluation
    arrivals: ArrivalsSink = _no_arrivals
