"""Spans of a trunk in every family of the coverage table: loss and gradients, or a refusal."""

from collections import defaultdict

import pytest

from flower_split.errors import SplitError, TrunkRefused
from flower_split.split import CutLayers, set_trunk, split_model
from flower_split.split.structure.stack import find_stack
from flower_split.trunk.compute.spans import Spans
from tests.unit.split.coverage import TASKS, _compare, _run, _run_whole, _tiny_model, families


def outcome(family: str, task: str) -> str:
    """What becomes of a client that keeps one trunk layer more at either end."""
    try:
        model = _tiny_model(family, TASKS[task])
        _, batch, expected = _run_whole(model, TASKS[task])
        last = find_stack(model).num_layers
    except Exception:  # the coverage table says why
        return "not run"
    if last < 4:
        return "too few layers"
    wide, narrow = CutLayers(1, last), CutLayers(2, last - 1)
    try:
        _, trunk = split_model(model, wide)
        client, _ = split_model(model, narrow)
    except SplitError:
        return "cannot be split"
    first = next(trunk.parameters())
    try:
        Spans(trunk, first.device, first.dtype).admit(narrow)
    except TrunkRefused:
        return "refused"
    span = trunk.span(narrow)
    set_trunk(client, span)
    try:
        return _compare(expected, _run(batch, client, span), "")[0]
    except SplitError:
        return "cannot be split"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "at_least"),
    [
        ("causal-lm", 150),
        ("sequence-classification", 90),
        ("masked-lm", 30),
        ("image-classification", 5),
        ("seq2seq", 25),
        ("image-text-to-text", 50),
    ],
)
def test_span_of_every_family_is_identical_or_refused(task: str, at_least: int) -> None:
    found = defaultdict(list)
    for family in families(task):
        found[outcome(family, task)].append(family)
    assert not found["failed"]
    tried = len(found["identical"]) + len(found["refused"]) + len(found["within tolerance"])
    assert len(found["identical"]) >= 0.95 * tried, dict(found)
    assert len(found["identical"]) >= at_least
