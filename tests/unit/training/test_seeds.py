"""Random numbers of a micro-batch on its client: those of ``torch.manual_seed``; the state comes back."""

import pytest
import torch
from torch.nn.functional import dropout

from flower_split.training.round import ComputeTurns


@pytest.mark.parametrize("seed", [0, 7, 2**56 - 1, 2**64 - 1])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_micro_batch_draws_as_after_manual_seed_and_leaves_the_state_alone(
    seed: int, device: str
) -> None:
    ones = torch.ones(999, device=device)
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(3)
        after = dropout(ones)
        torch.manual_seed(seed)
        wanted = dropout(ones), torch.randperm(99)
        torch.manual_seed(3)
        with ComputeTurns([torch.device(device)]).computing(seed):
            found = dropout(ones), torch.randperm(99)
        assert torch.equal(dropout(ones), after)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
