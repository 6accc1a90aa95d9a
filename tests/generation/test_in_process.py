"""Generation with a trunk in process equals the unsplit model's, token for token."""

import pytest
import torch

from flower_split.split import CutLayers, split_model
from tests.generation.rig import CUTS, FAMILIES, MODES, generated, lively_model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_cache_equals_unsplit(family: str, mode: str) -> None:
    model = lively_model(family)
    client, _ = split_model(model, CUTS)
    assert client.generation_config.use_cache
    expected = generated(model, mode)
    assert len(set(expected[0].tolist())) > 5
    assert torch.equal(generated(client, mode), expected)


@pytest.mark.parametrize("cuts", [(0, 2), (2, 4), (0, 4)])
def test_generate_with_other_cuts_equals_unsplit(cuts: tuple[int, int]) -> None:
    model = lively_model("gemma3_text")
    client, _ = split_model(model, CutLayers(*cuts))
    assert torch.equal(generated(client, "beam"), generated(model, "beam"))
