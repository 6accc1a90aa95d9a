"""One of eight clients sends NaN: it is named, and the round is that of the seven others."""

import pytest
import torch

from flower_split.errors import RefusalReason, RoundAborted, TrunkRefused
from flower_split.lora import adapter_state
from tests.acceptance.federation import federation, make_batch, make_config, write_checkpoint

BATCHES = {slot: [make_batch(2, [9, 4 + slot], seed=slot)] for slot in range(8)}
BAD = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def poison(adapter):
    """An adapter whose smashed data is NaN."""
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in adapter.items()}


def test_round_with_quorum_goes_on_as_without_the_client_that_sends_nan(checkpoint):
    trunks, returned = [], []
    for slots in (range(8), [slot for slot in range(8) if slot != BAD]):
        with federation(make_config(checkpoint)) as run:
            adapter = adapter_state(run.client_model(0))
            poisoned = {BAD: poison(adapter)} if BAD in slots else {}
            states, _, report = run.train(
                adapter, {slot: BATCHES[slot] for slot in slots}, poisoned=poisoned, quorum=0.75
            )
            if poisoned:
                error = run.failed[BAD]
                assert isinstance(error, TrunkRefused)
                assert error.reason is RefusalReason.NON_FINITE
                assert f"slot {BAD}" in str(error)
                left_out = [slot.slot for slot in report.slots if not slot.completed]
                assert left_out == [BAD]
            trunks.append(run.engine.adapter())
            returned.append(states)
    assert all(torch.equal(trunks[0][name], trunks[1][name]) for name in trunks[1])
    assert returned[0].keys() == returned[1].keys()
    for slot, state in returned[1].items():
        assert all(torch.equal(returned[0][slot][name], state[name]) for name in state)


def test_round_without_quorum_ends_and_keeps_nothing(checkpoint):
    with federation(make_config(checkpoint)) as run:
        before = run.engine.adapter()
        adapter = adapter_state(run.client_model(0))
        with pytest.raises(RoundAborted, match=f"slot {BAD}"):
            run.train(adapter, BATCHES, poisoned={BAD: poison(adapter)})
        after = run.engine.adapter()
    assert all(torch.equal(before[name], after[name]) for name in before)
