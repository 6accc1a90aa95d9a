"""What log and report say about how a run's steps end."""

import pytest

from flower_split.config import Scalar, parse_run_config
from flower_split.server.step_ends import GRADIENTS_ARE_SEEN, step_notes

AUTO: dict[str, Scalar] = {"train.max-grad-norm-over": "auto"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (AUTO | {"trunk.step-every": "server-round"}, "does not step with every local step"),
        (AUTO | {"trunk.optimizer.max-grad-norm": 0.5}, "max-grad-norm differ"),
        (AUTO | {"trunk.reduction": "median"}, "no client's norm may scale"),
    ],
)
def test_auto_that_falls_back_to_part_says_why(settings: dict[str, Scalar], words: str) -> None:
    (note,) = step_notes(parse_run_config(settings))
    assert "clips each part by itself" in note and words in note


@pytest.mark.parametrize(
    "settings", [{}, AUTO, AUTO | {"mode": "frozen", "train.optimizer.max-grad-norm": 0.0}]
)
def test_nothing_is_said_where_nothing_falls_back(settings: dict[str, Scalar]) -> None:
    assert step_notes(parse_run_config(settings)) == []


def test_shared_gradients_are_told() -> None:
    shared: dict[str, Scalar] = {"train.sync": "gradients", "strategy.aggregator": "fedit"}
    assert step_notes(parse_run_config(shared)) == [GRADIENTS_ARE_SEEN]
