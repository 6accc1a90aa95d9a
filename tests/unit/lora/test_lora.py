"""LoRA per part: where it goes, what it begins with, its names, its scale."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flower_split.config import LoraPartConfig
from flower_split.errors import ConfigError, SplitError
from flower_split.lora import (
    adapter_state,
    attach_lora,
    initial_client_adapter,
    load_adapter_state,
    lora_scales,
    set_trainable,
)
from flower_split.split import CutLayers, split_model
from tests.support.tiny_models import padded_batch, tiny_model

CUTS = CutLayers(1, 3)
PARTS = {
    "bottom": LoraPartConfig(r=2, alpha=3.0),
    "trunk": LoraPartConfig(r=4, alpha=8.0, target_modules="q_proj,v_proj"),
    "top": LoraPartConfig(r=9, alpha=6.0, use_rslora=True, target_modules="down_proj"),
}
CLIENT_PARTS = {part: PARTS[part] for part in ("bottom", "top")}


def _unsplit_with_lora(seed: int = 0) -> nn.Module:
    model = tiny_model("llama")
    attach_lora(model, CUTS, PARTS, seed=seed)
    return model


def test_attach_lora_each_part_gets_its_own_setting() -> None:
    model = _unsplit_with_lora()
    state, scales = adapter_state(model), lora_scales(model)
    # 7 linear layers in layer 0, 2 x 2 in layers 1 and 2, 1 in layer 3.
    assert len(scales) == 7 + 4 + 1
    assert len(state) == 2 * len(scales)
    assert state["model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 32)
    assert state["model.layers.0.mlp.up_proj.lora_B.weight"].shape == (48, 2)
    assert state["model.layers.2.self_attn.v_proj.lora_A.weight"].shape == (4, 32)
    assert state["model.layers.3.mlp.down_proj.lora_A.weight"].shape == (9, 48)
    assert scales["model.layers.0.mlp.up_proj"] == 1.5
    assert scales["model.layers.1.self_attn.q_proj"] == 2.0
    assert scales["model.layers.3.mlp.down_proj"] == 2.0  # 6 / sqrt(9)


def test_attach_lora_scales_are_those_of_the_computation() -> None:
    model = _unsplit_with_lora()
    for name, scale in lora_scales(model).items():
        layer = model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(b)
        x = torch.randn(3, a.shape[1])
        expected = layer.base_layer(x) + scale * x @ a.T @ b.T
        torch.testing.assert_close(layer(x), expected)


def test_attach_lora_freezes_everything_else() -> None:
    model = _unsplit_with_lora()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


def test_attach_lora_keeps_the_class_and_the_function_of_the_model() -> None:
    model = tiny_model("gpt2")
    logits = model(**padded_batch()).logits
    kind = type(model)
    attach_lora(model, CUTS, {"bottom": LoraPartConfig(), "top": LoraPartConfig()}, seed=0)
    assert type(model) is kind
    assert torch.equal(model(**padded_batch()).logits, logits)  # B is zero


def test_attach_lora_initial_values_do_not_depend_on_the_holder() -> None:
    whole = adapter_state(_unsplit_with_lora(seed=4))
    client, trunk = split_model(tiny_model("llama"), CUTS)
    torch.manual_seed(99)
    attach_lora(client, CUTS, CLIENT_PARTS, seed=4)
    attach_lora(trunk, CUTS, {"trunk": PARTS["trunk"]}, seed=4)
    parts = adapter_state(client) | adapter_state(trunk)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_attach_lora_initial_values_are_pefts_distribution() -> None:
    state = adapter_state(_unsplit_with_lora(seed=4))
    other = adapter_state(_unsplit_with_lora(seed=5))
    seen = set()
    for name, value in state.items():
        if "lora_B" in name:
            assert not value.any()
            continue
        # Kaiming uniform with a = sqrt(5): bound 1 / sqrt(in).
        bound = value.shape[1] ** -0.5
        assert value.abs().max() <= bound
        assert value.abs().max() > 0.8 * bound
        assert not torch.equal(value, other[name])
        seen.add(value.flatten()[0].item())
    assert len(seen) == len(state) // 2


def test_attach_lora_on_bfloat16_keeps_its_weights_in_fp32() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    attach_lora(model, CUTS, PARTS, seed=0)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if "lora_" in name else torch.bfloat16
        assert parameter.dtype is expected, name
    assert torch.isfinite(model(**padded_batch()).loss)


def test_attach_lora_rank_zero_adds_nothing() -> None:
    model = tiny_model("llama")
    attach_lora(model, CUTS, {"bottom": LoraPartConfig(r=0), "top": PARTS["top"]}, seed=0)
    assert list(lora_scales(model)) == ["model.layers.3.mlp.down_proj"]


def test_attach_lora_to_no_part_freezes_the_model() -> None:
    model = tiny_model("llama")
    attach_lora(model, CUTS, {"bottom": LoraPartConfig(r=0)}, seed=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_attach_lora_all_linear_leaves_the_output_embeddings() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    attach_lora(model, CUTS, {"top": LoraPartConfig(r=2)}, seed=0)
    assert set(lora_scales(model)) == {
        f"model.layers.3.{name}"
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }


def test_attach_lora_head_and_embedding_belong_to_top_and_bottom() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    parts = {
        "bottom": LoraPartConfig(r=2, target_modules="embed_tokens"),
        "top": LoraPartConfig(r=3, target_modules="lm_head"),
    }
    attach_lora(model, CUTS, parts, seed=0)
    state = adapter_state(model)
    assert {name: list(value.shape) for name, value in state.items()} == {
        "lm_head.lora_A.weight": [3, 32],
        "lm_head.lora_B.weight": [64, 3],
        "model.embed_tokens.lora_embedding_A": [2, 64],
        "model.embed_tokens.lora_embedding_B": [32, 2],
    }
    assert not state["model.embed_tokens.lora_embedding_A"].any()
    assert state["model.embed_tokens.lora_embedding_B"].any()
    load_adapter_state(model, state)
    assert torch.isfinite(model(**padded_batch()).loss)


def test_attach_lora_unknown_target_names_the_linear_modules() -> None:
    parts = {"bottom": LoraPartConfig(target_modules="q_proj,qkv")}
    with pytest.raises(ConfigError, match=r"lora\.bottom\.target-modules names qkv.*down_proj"):
        attach_lora(tiny_model("llama"), CUTS, parts, seed=0)


def test_attach_lora_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="middle"):
        attach_lora(tiny_model("llama"), CUTS, {"middle": LoraPartConfig()}, seed=0)


def test_attach_lora_twice_is_refused() -> None:
    with pytest.raises(SplitError, match="LoRA already"):
        attach_lora(_unsplit_with_lora(), CUTS, PARTS, seed=0)


def test_adapter_state_is_a_sorted_copy() -> None:
    model = _unsplit_with_lora()
    state = adapter_state(model)
    assert list(state) == sorted(state)
    for value in state.values():
        assert value.dtype is torch.float32 and not value.requires_grad
        value.fill_(7.0)
    assert not any((value == 7.0).all() for value in adapter_state(model).values())


def test_load_adapter_state_round_trip_is_exact() -> None:
    source, target = _unsplit_with_lora(seed=1), _unsplit_with_lora(seed=2)
    load_adapter_state(target, adapter_state(source))
    state = adapter_state(target)
    assert all(torch.equal(state[k], v) for k, v in adapter_state(source).items())
    assert all(p.requires_grad == ("lora_" in n) for n, p in target.named_parameters())


def test_load_adapter_state_that_does_not_fit_names_every_problem() -> None:
    model = _unsplit_with_lora()
    state = adapter_state(model)
    before = {name: value.clone() for name, value in state.items()}
    state["model.layers.9.x.lora_A.weight"] = torch.zeros(1)
    del state["model.layers.0.mlp.up_proj.lora_A.weight"]
    state["model.layers.0.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 3)
    with pytest.raises(SplitError) as caught:
        load_adapter_state(model, state)
    message = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.lora_A.weight" in message
    assert "unexpected: model.layers.9.x.lora_A.weight" in message
    assert "lora_B.weight is [48, 3] instead of [48, 2]" in message
    assert all(torch.equal(before[k], v) for k, v in adapter_state(model).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_initial_client_adapter_is_the_clients_without_its_weights(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)  # no weights are there to be read
    parts = {"bottom": LoraPartConfig(r=2), "top": LoraPartConfig(r=3, use_rslora=True)}
    state, scales = initial_client_adapter(str(tmp_path), CUTS, parts, seed=11)
    client, _ = split_model(model, CUTS)
    attach_lora(client, CUTS, parts, seed=11)
    expected = adapter_state(client)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert scales == lora_scales(client)


def test_set_trainable_freezes_the_others_and_none_frees_them_again() -> None:
    model = _unsplit_with_lora()
    names = [name for name in adapter_state(model) if name.endswith("lora_B.weight")]
    set_trainable(model, names)
    assert {".lora_B." in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    set_trainable(model, None)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(names)
