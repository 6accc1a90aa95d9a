"""What a run's records say of it as a whole: facts and notes for its report."""

from collections.abc import Mapping, Sequence

from flower_split.runs.files import Json

Record = Mapping[str, Json]


def lateness(arrivals: Sequence[Record]) -> dict[str, int | float]:
    """Return how late an asynchronous run's arrivals were, in versions; empty for any other run.

    Args:
        arrivals: The records of kind "arrival".
    """
    late = [int(str(record["staleness"])) for record in arrivals if "staleness" in record]
    if not arrivals:
        return {}
    return {
        "arrivals": len(late),
        "mean staleness": round(sum(late) / max(len(late), 1), 3),
        "largest staleness": max(late, default=0),
        "dispatches dropped": sum("dropped" in record for record in arrivals),
    }


def truncation(aggregations: Sequence[Record]) -> dict[str, float]:
    """Return what the server knew beyond the adapter that it wrote, after the last round.

    Args:
        aggregations: The records of kind "aggregation".
    """
    share = aggregations[-1].get("truncation", 0.0) if aggregations else 0.0
    label = "share of ΔW beyond the adapter's rank, kept by the server only"
    return {label: share} if isinstance(share, float) and share > 0 else {}


def exclusions(aggregations: Sequence[Record]) -> list[str]:
    """Return one note for each client whose adapter was ever left out, with its first reason.

    Args:
        aggregations: The records of kind "aggregation".
    """
    rounds: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for record in aggregations:
        excluded, number = record["excluded"], record["server_round"]
        if isinstance(excluded, Mapping) and isinstance(number, int):
            for client, why in excluded.items():
                rounds.setdefault(client, []).append(number)
                reasons.setdefault(client, str(why))
    return [
        f"Partition {client}: its adapter was left out in round "
        f"{', '.join(str(number) for number in rounds[client])}. {reasons[client]}"
        for client in sorted(rounds)
    ]
