"""Spans of a trunk in every family of the coverage table."""

from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flower_split.errors import SplitError, TrunkRefused
from flower_split.split import CutLayers, set_trunk, split_model
from flower_split.trunk.spans import Spans
from tests.split.coverage import families
from tests.split.tiny_configs import tiny_config

WIDE, NARROW = CutLayers(1, 4), CutLayers(2, 3)


def tiny(family: str) -> PreTrainedModel | None:
    torch.manual_seed(0)
    try:
        return AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    except Exception:  # the coverage table says why
        return None


def outcome(model: PreTrainedModel) -> str:
    """What becomes of a client that keeps two of the trunk's three layers."""
    try:
        _, trunk = split_model(model, WIDE)
        client, _ = split_model(model, NARROW)
    except SplitError:
        return "cannot be split"
    first = next(trunk.parameters())
    try:
        Spans(trunk, first.device, first.dtype).admit(NARROW)
    except TrunkRefused:
        return "refused"
    set_trunk(client, trunk.span(NARROW))
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        found = client(input_ids=ids, attention_mask=mask).logits
        expected = model(input_ids=ids, attention_mask=mask).logits
    return "identical" if torch.equal(found[mask.bool()], expected[mask.bool()]) else "another"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_span_of_every_family_is_identical_or_refused() -> None:
    found = defaultdict(list)
    for family in families():
        model = tiny(family)
        if model is not None:
            found[outcome(model)].append(family)
    assert not found["another"]
    tried = len(found["identical"]) + len(found["refused"])
    assert len(found["identical"]) >= 0.95 * tried > 100, found["refused"]
