"""Adapters of every supported variety go client → strategy → client → export → plain PEFT."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flower_split.aggregation import METHODS
from flower_split.aggregation.adapter_aggregator import AdapterAggregator, AdapterUpdate
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
    parse_run_config,
)
from flower_split.errors import ConfigError
from flower_split.lora import (
    adapter_state,
    attach_lora,
    base_values,
    initial_client_adapter,
    load_adapter_state,
    lora_scales,
)
from flower_split.lora.base_change import base_change_state, set_base_change
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import client_parts, model_cuts, trunk_parts
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.split import load_client_model, load_trunk_model
from tests.support.tiny_models import FAMILIES, padded_batch, tiny_model

# PEFT asks for a property that transformers has renamed, and wonders about tied embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning"),
]

LORA = LoraPartConfig
PATTERNS = LORA(
    r=4,
    alpha=6.0,
    rank_pattern="q_proj=2, mlp.up_proj=7, layers.3.mlp.up_proj=3",
    alpha_pattern="v_proj=20",
)
DORA = LORA(r=4, use_dora=True)
TIED, UNTIED = ("llama", True), ("llama", False)
GPT2 = ("gpt2", True)  # Conv1D, biases, tied embeddings
VARIETIES: dict[str, tuple[LoraConfigs, tuple[str, bool]]] = {
    "rslora": (
        LoraConfigs(bottom=LORA(r=4, use_rslora=True), top=LORA(r=2, use_rslora=True)),
        TIED,
    ),
    "patterns": (
        LoraConfigs(bottom=replace(PATTERNS, rank_pattern="q_proj=2"), top=PATTERNS),
        TIED,
    ),
    "patterns and rslora": (LoraConfigs(top=replace(PATTERNS, use_rslora=True)), TIED),
    "trunk patterns": (LoraConfigs(trunk=LORA(r=3, rank_pattern="down_proj=6")), TIED),
    "gaussian": (LoraConfigs(bottom=LORA(r=4, init="gaussian"), top=LORA(init="gaussian")), TIED),
    "orthogonal": (
        LoraConfigs(bottom=LORA(r=4, init="orthogonal"), top=LORA(init="orthogonal")),
        TIED,
    ),
    "random": (LoraConfigs(bottom=LORA(r=4, init="random"), top=LORA(init="random")), TIED),
    "embeddings": (LoraConfigs(bottom=LORA(r=4, target_modules="embed_tokens,q_proj")), UNTIED),
    "head": (LoraConfigs(top=LORA(r=3, target_modules="lm_head,up_proj")), UNTIED),
    "embeddings, tied": (LoraConfigs(bottom=LORA(r=4, target_modules="embed_tokens")), TIED),
    "head, tied": (LoraConfigs(top=LORA(r=3, target_modules="lm_head,o_proj")), TIED),
    "embeddings and head, tied": (
        LoraConfigs(
            bottom=LORA(r=4, alpha=3.0, target_modules="embed_tokens"),
            top=LORA(r=3, target_modules="lm_head"),
        ),
        TIED,
    ),
    "dora": (LoraConfigs(bottom=DORA, trunk=DORA, top=replace(DORA, use_rslora=True)), TIED),
    "dora, gpt2": (LoraConfigs(bottom=DORA, trunk=DORA, top=DORA), GPT2),
    "dora of the top alone": (LoraConfigs(top=DORA), UNTIED),
    "dora of the bottom alone, gpt2": (LoraConfigs(bottom=DORA), GPT2),
    "dora, random": (LoraConfigs(bottom=replace(DORA, init="random"), top=DORA), TIED),
    "dora on embeddings": (
        LoraConfigs(bottom=replace(DORA, target_modules="embed_tokens"), top=DORA),
        UNTIED,
    ),
    "dora beside embeddings": (
        LoraConfigs(bottom=LORA(r=2, target_modules="embed_tokens"), top=DORA),
        TIED,
    ),
    "modules to save": (
        LoraConfigs(
            bottom=LORA(r=4, modules_to_save="embed_tokens"),
            trunk=LORA(r=4, modules_to_save="layers.1.mlp, layers.2.input_layernorm"),
            top=LORA(r=4, modules_to_save="lm_head,model.norm"),
        ),
        UNTIED,
    ),
    "embeddings to save, tied": (LoraConfigs(bottom=LORA(modules_to_save="embed_tokens")), TIED),
    "head to save, tied": (LoraConfigs(top=LORA(modules_to_save="lm_head")), TIED),
    "embeddings and head to save, tied": (
        LoraConfigs(
            bottom=LORA(modules_to_save="embed_tokens"), top=LORA(r=0, modules_to_save="lm_head")
        ),
        TIED,
    ),
    "modules to save, gpt2": (
        LoraConfigs(
            bottom=LORA(r=4, modules_to_save="wpe"), top=LORA(r=4, modules_to_save="ln_f,lm_head")
        ),
        GPT2,
    ),
    "bias": (
        LoraConfigs(
            bottom=LORA(r=4, bias="all"),
            trunk=LORA(r=4, bias="all"),
            top=LORA(r=4, bias="lora_only", target_modules="c_attn"),
        ),
        GPT2,
    ),
    "bias, qwen2": (
        LoraConfigs(bottom=LORA(bias="lora_only"), top=LORA(bias="all")),
        ("qwen2", True),
    ),
    "biases alone": (
        LoraConfigs(
            bottom=LORA(r=0, bias="all"), trunk=LORA(r=0, bias="all"), top=LORA(r=0, bias="all")
        ),
        GPT2,
    ),
    "everything at once": (
        LoraConfigs(
            bottom=replace(DORA, bias="all", modules_to_save="wte"),
            top=replace(DORA, bias="all", modules_to_save="ln_f", rank_pattern="c_attn=2"),
        ),
        GPT2,
    ),
    "full top": (LoraConfigs(top=LORA(train="full")), UNTIED),
    "full top, tied": (LoraConfigs(top=LORA(train="full")), TIED),
    "full bottom": (LoraConfigs(bottom=LORA(train="full")), TIED),
    "full bottom and top, tied": (
        LoraConfigs(bottom=LORA(train="full"), top=LORA(train="full")),
        TIED,
    ),
    "full bottom and top, gpt2": (
        LoraConfigs(bottom=LORA(train="full"), trunk=DORA, top=LORA(train="full")),
        GPT2,
    ),
    "full bottom and top, no LoRA": (
        LoraConfigs(
            bottom=LORA(train="full"),
            trunk=LORA(r=0, modules_to_save="layers.1"),
            top=LORA(train="full"),
        ),
        TIED,
    ),
}


def changed(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As after training: every value has moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def make(
    tmp_path: Path,
    lora: LoraConfigs,
    base: tuple[str, bool] = TIED,
    aggregator: str = "fedit",
    dtype: str = "float32",
) -> tuple[RunConfig, nn.Module, nn.Module]:
    family, tied = base
    path = tmp_path / "base"
    model = tiny_model(family, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():  # families begin theirs at 0 and 1
        if "bias" in name or "norm" in name or "ln_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    config = RunConfig(
        model=ModelConfig(name=str(path), first_cut=1, second_cut=3, dtype=dtype),
        lora=lora,
        strategy=StrategyConfig(aggregator=aggregator),
        run_dir=str(tmp_path / "run"),
    )
    cuts = model_cuts(config)
    trunk = load_trunk_model(str(path), cuts, dtype=dtype)
    attach_lora(trunk, cuts, trunk_parts(config), seed=config.seed)
    client = load_client_model(str(path), cuts, trunk, dtype=dtype)
    attach_lora(client, cuts, client_parts(config), seed=config.seed)
    return config, client, trunk


def beginning(config: RunConfig, client: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the ServerApp begins with: what it draws itself, and the base values of a client."""
    values = base_values(client)
    return initial_client_adapter(
        config.model.name,
        model_cuts(config),
        client_parts(config),
        seed=config.seed,
        fetch=lambda shapes: {name: values[name] for name in shapes},
    )


def federated(aggregator: AdapterAggregator, client: nn.Module, rounds: int = 2) -> None:
    """Rounds of two clients, each with a change of its own; the client ends with the result."""
    for server_round in range(rounds):
        sent = aggregator.distribute()
        load_adapter_state(client, sent)
        aggregator.aggregate(
            [
                AdapterUpdate(
                    slot,
                    sent,
                    changed(adapter_state(client), 10 * server_round + slot),
                    1.0 + slot,
                )
                for slot in range(2)
            ]
        )
    load_adapter_state(client, aggregator.distribute())


def exported(
    tmp_path: Path,
    config: RunConfig,
    client: nn.Module,
    trunk: nn.Module,
    aggregator: AdapterAggregator | None = None,
) -> Path:
    run = RunDirectory.create(config)
    if aggregator is not None and aggregator.method.changes_base:
        run.write_adapter("base", base_change_state(aggregator.base_changes()))
    run.write_adapter("client", adapter_state(client))
    run.write_adapter("trunk", adapter_state(trunk))
    return export_adapter(run.path, tmp_path / "out")


@pytest.mark.parametrize("variety", VARIETIES)
def test_adapter_survives_the_round_trip_to_plain_peft(tmp_path: Path, variety: str) -> None:
    config, client, trunk = make(tmp_path, *VARIETIES[variety])
    initial, scales = beginning(config, client)
    own = adapter_state(client)
    assert list(own) == list(initial) and scales == lora_scales(client)
    assert all(torch.equal(own[name], initial[name]) for name in own)
    aggregator = AdapterAggregator("fedit", scales)
    aggregator.init(initial)
    federated(aggregator, client)
    load_adapter_state(trunk, changed(adapter_state(trunk), 7))

    plain = AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    without = plain(**padded_batch()).logits.detach()
    expected = client.eval()(**padded_batch()).logits
    peft = PeftModel.from_pretrained(plain, str(exported(tmp_path, config, client, trunk))).eval()
    torch.testing.assert_close(peft(**padded_batch()).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-2


FULL = LORA(train="full")
OF_FAMILIES = {
    "full": LoraConfigs(bottom=FULL, top=FULL),
    "full top": LoraConfigs(top=FULL),
    "dora": LoraConfigs(bottom=DORA, trunk=DORA, top=replace(DORA, init="random")),
    "bias": LoraConfigs(bottom=LORA(r=2, bias="all"), top=LORA(r=2, bias="all")),
}
WITH_BIASES = ("gpt2", "qwen2", "gpt_neox", "opt", "bloom", "falcon", "gptj")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variety", OF_FAMILIES)
def test_adapter_of_a_family_survives_the_round_trip(
    tmp_path: Path, family: str, variety: str
) -> None:
    if variety == "bias" and family not in WITH_BIASES:
        with pytest.raises(ConfigError, match=r"lora\.bottom\.bias"):
            make(tmp_path, OF_FAMILIES[variety], (family, True))
        return
    config, client, trunk = make(tmp_path, OF_FAMILIES[variety], (family, True))
    initial, scales = beginning(config, client)
    aggregator = AdapterAggregator("product-delta", scales)
    aggregator.init(initial)
    federated(aggregator, client)
    load_adapter_state(trunk, changed(adapter_state(trunk), 7))
    expected = client.eval()(**padded_batch()).logits
    path = str(exported(tmp_path, config, client, trunk))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), path)
    found = peft.eval()(**padded_batch()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_adapter_of_a_bfloat16_base_is_exported_in_fp32(tmp_path: Path) -> None:
    parts = LoraConfigs(bottom=replace(DORA, bias="all"), top=LORA(modules_to_save="ln_f,lm_head"))
    config, client, trunk = make(tmp_path, parts, GPT2, dtype="bfloat16")
    initial, scales = beginning(config, client)
    aggregator = AdapterAggregator("product-delta", scales)
    aggregator.init(initial)
    federated(aggregator, client)
    path = exported(tmp_path, config, client, trunk)
    saved = load_file(path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    final = aggregator.distribute()
    assert torch.equal(saved["base_model.model.lm_head.weight"], final["lm_head.weight"])
    assert final["lm_head.weight"].bfloat16().float().ne(final["lm_head.weight"]).any()
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="bfloat16")
    peft = PeftModel.from_pretrained(base, str(path)).eval()
    expected = client.eval()(**padded_batch()).logits
    torch.testing.assert_close(peft(**padded_batch()).logits, expected, rtol=5e-2, atol=5e-2)


BESIDE = LoraConfigs(
    bottom=LORA(r=4, bias="all", modules_to_save="wte", init="random"),
    top=LORA(r=4, alpha=2.0, bias="lora_only", modules_to_save="ln_f"),
)
MIXED_DORA = LoraConfigs(
    bottom=replace(BESIDE.bottom, use_dora=True), top=replace(BESIDE.top, use_dora=True)
)


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        *((name, "lora") for name, method in METHODS.items() if not method.private),
        *((name, "dora") for name in ("fedit", "product-delta", "raflora")),
    ],
)
def test_adapter_survives_every_method_on_the_way(tmp_path: Path, method: str, lora: str) -> None:
    parts = BESIDE if lora == "lora" else MIXED_DORA
    config, client, trunk = make(tmp_path, parts, GPT2, method)
    initial, scales = beginning(config, client)
    aggregator = AdapterAggregator(method, scales)
    aggregator.init(initial)
    federated(aggregator, client)
    set_base_change(client, base_change_state(aggregator.base_changes()))
    expected = client.eval()(**padded_batch()).logits
    path = str(exported(tmp_path, config, client, trunk, aggregator))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), path)
    torch.testing.assert_close(peft.eval()(**padded_batch()).logits, expected, rtol=1e-5, atol=1e-5)
    kinds = ("wte.weight", "ln_f.bias", "c_attn.base_layer.bias", "lora_magnitude_vector")
    final = adapter_state(client)
    for kind in kinds if lora == "dora" else kinds[:-1]:  # what is no factor is averaged by all
        (name, *_) = (name for name in final if name.endswith(kind))
        assert (final[name] - initial[name]).abs().max() > 1e-2, name


def test_patterns_give_the_longest_matching_name_its_rank_and_alpha(tmp_path: Path) -> None:
    _, client, _ = make(tmp_path, LoraConfigs(top=PATTERNS))
    state, scales = adapter_state(client), lora_scales(client)
    ranks = {name: state[f"model.layers.3.{name}.lora_A.weight"].shape[0] for name in _NAMES}
    assert ranks == {"self_attn.q_proj": 2, "mlp.up_proj": 3, "self_attn.v_proj": 4}
    found = {name: scales[f"model.layers.3.{name}"] for name in _NAMES}
    assert found == {"self_attn.q_proj": 3.0, "mlp.up_proj": 2.0, "self_attn.v_proj": 5.0}


_NAMES = ("self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj")


def test_gaussian_init_has_pefts_spread(tmp_path: Path) -> None:
    _, client, _ = make(tmp_path, LoraConfigs(top=LORA(r=16, init="gaussian")))
    a = adapter_state(client)["model.layers.3.mlp.down_proj.lora_A.weight"]
    assert a.std().item() == pytest.approx(1 / 16, rel=0.1)


def test_fingerprint_tells_patterns_apart(tmp_path: Path) -> None:
    config, _, _ = make(tmp_path, LoraConfigs())
    other = replace(config, lora=LoraConfigs(top=PATTERNS))
    mine, theirs = fingerprint(config), fingerprint(other)
    assert [name for name in mine if mine[name] != theirs[name]] == ["lora.top"]


def test_pattern_that_matches_nothing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.top\.rank-pattern names q_prj"):
        make(tmp_path, LoraConfigs(top=LORA(rank_pattern="q_prj=2")))


@pytest.mark.parametrize("pattern", ["q_proj", "q_proj=", "q_proj=-1", "q_proj=2.5"])
def test_pattern_that_is_malformed_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="rank-pattern"):
        LORA(rank_pattern=pattern)


@pytest.mark.parametrize(
    "option", ["init-lora-weights", "lora-bias", "layer-replication", "use-qalora"]
)
def test_option_that_cannot_be_aggregated_is_refused_by_name(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.top\.{option} is not supported: .+"):
        parse_run_config({f"lora.top.{option}": True})
