"""What trains, and what crosses the wire, in each mode."""

import pytest
import torch

from flower_split.lora import adapter_state
from tests.acceptance.federation import federation, make_batch, make_config, write_checkpoint

BATCHES = {0: [make_batch(2, [9, 4], seed=1)], 1: [make_batch(2, [5, 5], seed=2)]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def run_mode(checkpoint, mode, **train):
    """Adapters before and after one round of two steps, the results, the trunk's report."""
    config = make_config(checkpoint, mode=mode, **{"local_steps": 2, **train})
    batches = {slot: [*batch, *batch] for slot, batch in BATCHES.items()}
    with federation(config) as run:
        before = adapter_state(run.client_model(0))
        returned, results, report = run.train(before, batches, num_steps=2)
    return before, returned, results, report


def changed(before, after, layers):
    """Whether any adapter tensor of these layers changed."""
    names = [name for name in before if any(f".layers.{layer}." in name for layer in layers)]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize(
    ("mode", "train", "bottom", "top", "trunk_steps"),
    [
        ("joint", {}, True, True, 2),
        ("frozen", {}, True, True, 0),
        ("forward-only", {}, False, True, 0),
        ("forward-only", {"auxiliary_head": True}, True, True, 0),
    ],
)
def test_mode_trains_exactly_its_parts(checkpoint, mode, train, bottom, top, trunk_steps):
    before, returned, _, report = run_mode(checkpoint, mode, **train)
    for after in returned.values():
        assert changed(before, after, (0, 1)) == bottom
        assert changed(before, after, (4, 5)) == top
    assert report.optimizer_steps == trunk_steps
    assert all(slot.completed for slot in report.slots)


def test_auxiliary_loss_leaves_the_reported_loss_as_it_is(checkpoint):
    losses = [
        run_mode(checkpoint, "forward-only", auxiliary_head=auxiliary)[2][0].steps[0].loss
        for auxiliary in (False, True)
    ]
    assert losses[0] == losses[1]


def test_forward_only_sends_half_of_what_joint_sends(checkpoint):
    sent = {}
    for mode in ("joint", "forward-only"):
        _, _, results, _ = run_mode(checkpoint, mode)
        steps = results[1].steps  # rows without padding, of which no gradient would travel
        sent[mode] = sum(step.bytes_sent + step.bytes_received for step in steps)
    assert 0.4 < sent["forward-only"] / sent["joint"] < 0.6
