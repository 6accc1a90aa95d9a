"""What trains beside LoRA factors: magnitudes, biases, modules to save, parts in full."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from flower_split.config import LoraConfigs, LoraPartConfig, RunConfig
from flower_split.errors import ConfigError, SplitError
from flower_split.lora import (
    BaseWeight,
    adapter_state,
    attach_lora,
    base_digests,
    base_values,
    has_base_values,
    initial_client_adapter,
    load_adapter_state,
    set_trainable,
    weight_norms,
)
from flower_split.parties.fingerprint import _lora_text
from flower_split.split import CutLayers, split_model
from flower_split.split.structure.quantization import float_dtype
from tests.support.tiny_models import padded_batch, tiny_model

CUTS = CutLayers(1, 3)
PART = LoraPartConfig
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # PEFT asks
]


def attached(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, tied: bool = True, **parts: PART
) -> nn.Module:
    model = tiny_model(family, tie_word_embeddings=tied).to(dtype)
    attach_lora(model, CUTS, parts, seed=0)
    return model


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ which weights


def test_full_top_is_the_layers_after_the_trunk_the_norm_and_the_head() -> None:
    model = attached(tied=False, top=PART(train="full"))
    names = set(adapter_state(model))
    assert {n for n in names if "layers" not in n} == {"model.norm.weight", "lm_head.weight"}
    assert {n.split(".")[2] for n in names if "layers" in n} == {"3"}
    assert "model.layers.3.input_layernorm.weight" in names and len(names) == 9 + 2
    assert trains(model) == names
    assert all(isinstance(model.get_parameter(name), BaseWeight) for name in names)


def test_full_bottom_is_the_embeddings_and_the_layers_before_the_trunk() -> None:
    names = set(adapter_state(attached("gpt2", bottom=PART(train="full"))))
    assert {n for n in names if ".h." not in n} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert {n.split(".")[2] for n in names if ".h." in n} == {"0"}


@pytest.mark.parametrize("part", ["bottom", "top"])
def test_tied_weight_of_which_one_side_trains_is_untied(part: str) -> None:
    name = "embed_tokens" if part == "bottom" else "lm_head"
    model = attached(**{part: PART(r=0, modules_to_save=name)})
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is not embedding and torch.equal(head, embedding)
    assert trains(model) == {"lm_head.weight" if part == "top" else "model.embed_tokens.weight"}
    (head if part == "top" else embedding).data += 1
    assert not torch.equal(head, embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weight_of_which_both_sides_train_stays_tied(dtype: torch.dtype) -> None:
    parts = {"bottom": PART(train="full"), "top": PART(train="full")}
    model = attached(dtype=dtype, **parts)
    assert "lm_head.weight" not in adapter_state(model)
    state = adapter_state(model)
    load_adapter_state(model, {name: value + 1 for name, value in state.items()})
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    expected = (state["model.embed_tokens.weight"] + 1).to(dtype)
    assert torch.equal(model.lm_head.weight, expected)


def test_biases_are_those_that_peft_trains_by_the_names_it_saves_them_by() -> None:
    for kind in ("all", "lora_only"):
        parts = {
            p: PART(r=2, bias=kind, target_modules="c_attn") for p in ("bottom", "trunk", "top")
        }
        ours = set(adapter_state(attached("gpt2", **parts)))
        config = LoraConfig(r=2, bias=kind, target_modules=["c_attn"], fan_in_fan_out=True)
        peft = get_peft_model(tiny_model("gpt2"), config)
        prefix = "base_model.model."
        theirs = {n.removeprefix(prefix) for n in get_peft_model_state_dict(peft)}
        assert ours == theirs and any(n.endswith("c_attn.base_layer.bias") for n in ours)


def test_magnitude_has_the_name_that_peft_saves_it_by() -> None:
    ours = set(adapter_state(attached(top=PART(use_dora=True, target_modules="q_proj"))))
    assert ours == {
        f"model.layers.3.self_attn.q_proj.{name}"
        for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }


def test_all_linear_leaves_out_what_trains_whole() -> None:
    state = adapter_state(attached(top=PART(r=2, modules_to_save="mlp")))
    assert "model.layers.3.mlp.up_proj.weight" in state
    assert not any("mlp" in name and "lora" in name for name in state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modules_to_save": "lm_hed"}, "lora.top.modules-to-save names lm_hed"),
        ({"modules_to_save": "embed_tokens"}, "names embed_tokens, which is no module of the top"),
        ({"modules_to_save": "up_proj", "target_modules": "mlp.up_proj"}, "both name"),
        ({"bias": "all"}, 'bias is "all", but no such module'),
        ({"r": 3, "init": "orthogonal"}, "needs even ranks"),
        ({"init": "orthogonal", "rank_pattern": "q_proj=5"}, "q_proj has an odd one"),
    ],
)
def test_setting_that_fits_nothing_is_refused_by_name(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        attached(top=replace(PART(), **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "half"}, "lora.*.train must be one of"),
        ({"bias": "some"}, "lora.*.bias must be one of"),
        ({"init": "pissa"}, "lora.*.init must be one of"),
        ({"train": "full", "use_dora": True}, "use-dora says nothing more"),
        ({"train": "full", "bias": "all"}, "bias says nothing more"),
        ({"train": "full", "modules_to_save": "x"}, "modules-to-save says nothing more"),
        ({"r": 0, "use_dora": True}, "lora.*.r is 0"),
        ({"r": 0, "bias": "lora_only"}, "lora.*.r is 0"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(PART(), **changes)


def test_trunk_in_full_is_said_in_one_way_only() -> None:
    with pytest.raises(ConfigError, match=r'trunk\.train = "full"'):
        LoraConfigs(trunk=PART(train="full"))


def test_auxiliary_head_beside_a_head_that_trains_is_refused() -> None:
    config = RunConfig(mode="forward-only")
    train = replace(config.train, auxiliary_head=True)
    with pytest.raises(ConfigError, match="auxiliary-head"):
        replace(config, train=train, lora=LoraConfigs(top=PART(train="full")))


def test_quantised_weight_that_should_train_whole_is_refused() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    weight = torch.zeros(64, 32, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match="the weight of a Linear is quantised"):
        attach_lora(model, CUTS, {"top": PART(modules_to_save="lm_head")}, seed=0)


def test_attach_beside_whole_weights_is_refused() -> None:
    model = attached(top=PART(train="full"))
    with pytest.raises(SplitError, match="already"):
        attach_lora(model, CUTS, {"bottom": PART()}, seed=0)


# ------------------------------------------------------------------ their values


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_attached_model_computes_what_it_computed(family: str, init: str) -> None:
    part = PART(r=4, use_dora=True, init=init, modules_to_save="", bias="none")
    model = tiny_model(family).eval()
    expected = model(**padded_batch()).logits
    attach_lora(model, CUTS, {"bottom": part, "trunk": part, "top": part}, seed=0)
    tolerance = 0 if init == "kaiming" else 1e-5
    torch.testing.assert_close(model(**padded_batch()).logits, expected, rtol=0, atol=tolerance)


def test_magnitudes_begin_as_the_row_norms_of_the_weights() -> None:
    for family, turned in (("llama", False), ("gpt2", True)):
        model = attached(family, top=PART(r=2, alpha=3.0, use_dora=True, init="random"))
        state = adapter_state(model)
        for name in (n for n in state if n.endswith("lora_magnitude_vector")):
            module = name.removesuffix(".lora_magnitude_vector")
            weight = model.get_submodule(module).weight.detach().double()
            a, b = (state[f"{module}.lora_{f}.weight"].double() for f in "AB")
            norm = ((weight.T if turned else weight) + 1.5 * b @ a).norm(dim=1)
            torch.testing.assert_close(state[name].double(), norm, rtol=1e-6, atol=0)


def test_weight_norms_are_of_the_weights_as_trained_and_leave_the_magnitudes() -> None:
    model = attached(top=PART(r=2, use_dora=True, target_modules="up_proj"))
    state = {name: torch.randn_like(value) for name, value in adapter_state(model).items()}
    load_adapter_state(model, state)
    optimised = [p for p in model.parameters() if p.requires_grad]
    module = "model.layers.3.mlp.up_proj"
    a, b = (state[f"{module}.lora_{f}.weight"].double() for f in "AB")
    norm = (model.get_submodule(module).weight.detach().double() + 8.0 * b @ a).norm(dim=1)
    found = weight_norms(model)
    assert list(found) == [module]
    torch.testing.assert_close(found[module].double(), norm, rtol=1e-6, atol=0)
    assert all(torch.equal(v, state[n]) for n, v in adapter_state(model).items())
    kept = [p for p in model.parameters() if p.requires_grad]
    assert all(p is q for p, q in zip(optimised, kept, strict=True))


def test_orthogonal_begins_at_no_delta_with_both_factors_as_pefts() -> None:
    part = PART(r=4, init="orthogonal", target_modules="q_proj,down_proj")
    state = adapter_state(attached(top=part))
    for name in (n for n in state if "lora_A" in n):
        a, b = state[name], state[name.replace("lora_A", "lora_B")]
        assert (b @ a).abs().max() < 1e-6 < min(a.abs().max(), b.abs().max())
        assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 2
    # PEFT's entries are N(0, 1/100) turned and halved in rank: of variance (r/2)/r / 100.
    found = torch.cat([v.flatten() for v in state.values()]).std().item()
    assert found == pytest.approx(0.1 / math.sqrt(2), rel=0.15)


def test_random_begins_as_pefts_with_a_delta() -> None:
    part = PART(r=4, init="random", target_modules="down_proj")
    state = adapter_state(attached(top=part))
    (b,) = (v for n, v in state.items() if "lora_B" in n)
    assert 0.8 * 4**-0.5 < b.abs().max() <= 4**-0.5  # kaiming uniform of a [out, r] linear layer


def test_base_values_are_what_the_seed_does_not_say() -> None:
    part = PART(r=2, use_dora=True, modules_to_save="norm", target_modules="q_proj,up_proj")
    model = attached(top=part)
    parts = {"top": part}
    values = base_values(model)
    assert {n.rsplit(".", 1)[-1] for n in values} == {"weight", "lora_magnitude_vector"}
    assert "model.norm.weight" in values and has_base_values(parts)
    assert not any("lora_A" in n or "lora_B" in n for n in values)
    assert base_digests(model).keys() == values.keys()
    assert not has_base_values({"top": PART(), "bottom": PART(r=0)})


def test_base_digests_tell_base_weights_apart_and_not_adapters() -> None:
    part = PART(r=2, use_dora=True, modules_to_save="model.norm")
    one, other = attached(top=part), tiny_model("llama")
    load_adapter_state(one, adapter_state(one) | {
        n: v + 1 for n, v in adapter_state(one).items() if "lora" in n
    })  # fmt: skip
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
        other.model.norm.weight[0] += 1
    attach_lora(other, CUTS, {"top": part}, seed=0)
    mine, its = base_digests(one), base_digests(other)
    assert [name for name in mine if mine[name] != its[name]] == [
        "model.layers.3.mlp.up_proj.lora_magnitude_vector",
        "model.norm.weight",
    ]


def test_initial_client_adapter_refuses_base_values_that_do_not_fit(tmp_path: object) -> None:
    tiny_model("llama").config.save_pretrained(str(tmp_path))

    def begin(values: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return initial_client_adapter(
            str(tmp_path),
            CUTS,
            {"top": PART(r=2, modules_to_save="model.norm")},
            seed=0,
            fetch=None if values is None else lambda shapes: values,
        )[0]

    name = "model.norm.weight"
    assert name not in begin(None)
    assert torch.equal(begin({name: torch.ones(32)})[name], torch.ones(32))
    for bad in ({}, {name: torch.ones(31)}, {name: torch.ones(32), "other": torch.ones(1)}):
        with pytest.raises(SplitError, match="initial values of"):
            begin(bad)


# ------------------------------------------------------------------ a base in bfloat16


def test_whole_weights_of_a_bfloat16_base_train_and_travel_in_fp32() -> None:
    parts = {
        "bottom": PART(r=2, bias="all", modules_to_save="wte", use_dora=True),
        "top": PART(train="full"),
    }
    model = attached("gpt2", dtype=torch.bfloat16, tied=False, **parts)
    assert model.lm_head.weight.dtype is torch.bfloat16  # as its module computes with it
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    logits = model(**padded_batch()).logits
    assert logits.dtype is torch.bfloat16
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:  # B is zero
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # A change that bfloat16 cannot hold beside the weight survives the way to the server and back.
    state = adapter_state(model)
    small = {name: value * (1 + 2.0**-12) for name, value in state.items()}
    load_adapter_state(model, small)
    back = adapter_state(model)
    assert all(torch.equal(back[name], small[name]) for name in small)
    assert not torch.equal(small["lm_head.weight"], state["lm_head.weight"])


def test_dtype_of_a_trunk_is_that_of_its_base_and_not_of_what_trains_whole() -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    _, trunk = split_model(model, CUTS)
    attach_lora(trunk, CUTS, {"trunk": PART(modules_to_save="h.1.ln_1")}, seed=0)
    assert float_dtype(trunk) is torch.bfloat16


def test_set_trainable_freezes_and_frees_whole_weights_too() -> None:
    model = attached(top=PART(r=2, use_dora=True, modules_to_save="norm"))
    everything = trains(model)
    set_trainable(model, ["model.norm.weight"])
    assert trains(model) == {"model.norm.weight"}
    set_trainable(model, None)
    assert trains(model) == everything


def test_whole_weights_of_a_split_model_are_those_of_the_unsplit_one() -> None:
    parts = {
        "bottom": PART(train="full"),
        "trunk": PART(use_dora=True),
        "top": PART(bias="all", modules_to_save="ln_f"),
    }
    whole = attached("gpt2", **parts)
    client, trunk = split_model(whole, CUTS)
    assert adapter_state(client).keys() | adapter_state(trunk).keys() == adapter_state(whole).keys()
    batch = padded_batch()
    whole(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in whole.named_parameters() if p.requires_grad}
    for parameter in (*whole.parameters(), *client.parameters(), *trunk.parameters()):
        parameter.grad = None
    client(**batch).loss.backward()
    for model in (client, trunk):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, expected[name]), name


def test_fingerprint_tells_every_setting_apart() -> None:
    settings = [
        PART(),
        PART(r=0),
        PART(train="full"),
        PART(use_dora=True),
        PART(bias="all"),
        PART(bias="lora_only"),
        PART(modules_to_save="lm_head"),
        PART(r=0, modules_to_save="lm_head"),
        PART(r=0, bias="all"),
        PART(init="random"),
        PART(init="orthogonal"),
    ]
    assert len({_lora_text(part) for part in settings}) == len(settings)
