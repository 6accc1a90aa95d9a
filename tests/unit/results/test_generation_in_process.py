"""Generation with a trunk in process equals the unsplit model's, token for token."""

import gc

import pytest
import torch

from flower_split.split import CutLayers, set_trunk, split_model
from tests.support.generation_rig import CUTS, FAMILIES, MODES, generated, lively_model


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


def test_generate_with_prompt_lookup_takes_back_positions_as_the_unsplit_model() -> None:
    model = lively_model("llama")
    client, _ = split_model(model, CUTS)
    ids = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    options = {"max_new_tokens": 24, "prompt_lookup_num_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **options, eos_token_id=None, pad_token_id=0)
    found = client.generate(ids, **options, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)


def test_generate_with_a_trunk_that_keeps_nothing_recomputes_the_prefix() -> None:
    model = lively_model("llama")
    client, trunk = split_model(model, CUTS)
    seen = []

    class Plain(torch.nn.Module):
        def forward(self, hidden_states, attention_mask=None, position_ids=None):  # type: ignore[no-untyped-def]
            seen.append(hidden_states.shape[1])
            return trunk(hidden_states, attention_mask, position_ids)

    set_trunk(client, Plain())
    assert not client.generation_config.use_cache
    assert torch.equal(generated(client, "greedy"), generated(model, "greedy"))
    assert seen == list(range(7, 7 + 64))
    set_trunk(client, trunk)
    assert client.generation_config.use_cache
    generated(client, "greedy")
    gc.collect()
    assert not trunk._caches
