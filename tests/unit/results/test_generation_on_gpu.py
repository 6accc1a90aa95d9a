"""Generation with client and trunk on a GPU equals the unsplit model's there."""

import pytest
import torch

from flower_split.split import split_model
from tests.support.generation_rig import CUTS, MODES, NEW_TOKENS, lively_model, prompts
from tests.unit.results.test_generation_over_grpc import served

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_on_gpu_equals_unsplit(family: str, mode: str) -> None:
    model = lively_model(family).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompts().items()}
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | MODES[mode]

    def tokens(subject: torch.nn.Module) -> torch.Tensor:
        torch.manual_seed(11)
        return subject.generate(**inputs, **options)

    expected = tokens(model)
    client, _ = split_model(model, CUTS)
    assert torch.equal(tokens(client), expected)
    with served(model) as fed, fed.connect() as trunk:
        assert torch.equal(tokens(fed.client), expected)
        assert trunk.stats.calls == NEW_TOKENS
