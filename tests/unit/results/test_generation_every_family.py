"""Every family of the coverage table that generates by itself generates the same when split."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split import CutLayers, split_model
from tests.unit.split import coverage

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def logits(model: PreTrainedModel, use_cache: bool) -> Tensor:
    """Of eight new tokens after two prompts, one of them left-padded."""
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


def sampled(families: list[str]) -> list[object]:
    """Every third family by default, the others with the slow tests."""
    return [
        name if index % 3 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for index, name in enumerate(families)
    ]


@pytest.mark.parametrize("family", sampled(coverage.families()))
def test_generate_of_a_family_equals_unsplit(family: str) -> None:
    try:
        model = coverage._tiny_model(family).eval()
        logits(model, use_cache=True)
    except Exception as error:
        pytest.skip(f"the unsplit model does not generate here: {type(error).__name__}")
    try:
        client, _ = split_model(model, CutLayers(1, 3))
    except SplitError as error:
        pytest.skip(f"refused: {error}")
    use_cache = client.generation_config.use_cache
    expected = logits(model, use_cache)
    torch.testing.assert_close(logits(client, use_cache), expected, rtol=1e-5, atol=1e-5)
