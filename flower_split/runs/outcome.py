"""The outcome of one server round, as the round loops report it and the recorder writes it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """One finished round."""

    server_round: int  # 0: the evaluation before round 1
    seconds: float  # of training and evaluation together
