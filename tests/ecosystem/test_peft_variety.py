"""Adapters of every supported variety go client → strategy → client → export → plain PEFT."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flower_split.aggregation.modules import AdapterAggregator, AdapterUpdate
from flower_split.config import (
    LoraConfigs,
    LoraPartConfig,
    ModelConfig,
    RunConfig,
    parse_run_config,
)
from flower_split.errors import ConfigError
from flower_split.export import export_adapter
from flower_split.fingerprint import fingerprint
from flower_split.lora import (
    adapter_state,
    attach_lora,
    initial_client_adapter,
    load_adapter_state,
    lora_scales,
)
from flower_split.parts import client_parts, model_cuts, trunk_parts
from flower_split.report import RunDirectory
from flower_split.split import load_client_model, load_trunk_model
from tests.split.tiny import padded_batch, tiny_model

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
VARIETIES: dict[str, tuple[LoraConfigs, bool]] = {
    "rslora": (
        LoraConfigs(bottom=LORA(r=4, use_rslora=True), top=LORA(r=2, use_rslora=True)),
        True,
    ),
    "patterns": (
        LoraConfigs(bottom=replace(PATTERNS, rank_pattern="q_proj=2"), top=PATTERNS),
        True,
    ),
    "patterns and rslora": (LoraConfigs(top=replace(PATTERNS, use_rslora=True)), True),
    "trunk patterns": (LoraConfigs(trunk=LORA(r=3, rank_pattern="down_proj=6")), True),
    "gaussian": (LoraConfigs(bottom=LORA(r=4, init="gaussian"), top=LORA(init="gaussian")), True),
    "embeddings": (LoraConfigs(bottom=LORA(r=4, target_modules="embed_tokens,q_proj")), False),
    "head": (LoraConfigs(top=LORA(r=3, target_modules="lm_head,up_proj")), False),
    "embeddings, tied": (LoraConfigs(bottom=LORA(r=4, target_modules="embed_tokens")), True),
    "head, tied": (LoraConfigs(top=LORA(r=3, target_modules="lm_head,o_proj")), True),
    "embeddings and head, tied": (
        LoraConfigs(
            bottom=LORA(r=4, alpha=3.0, target_modules="embed_tokens"),
            top=LORA(r=3, target_modules="lm_head"),
        ),
        True,
    ),
}


def changed(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As after training: every value has moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def make(tmp_path: Path, lora: LoraConfigs, tied: bool) -> tuple[RunConfig, nn.Module, nn.Module]:
    base = tmp_path / "base"
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(base)
    config = RunConfig(
        model=ModelConfig(name=str(base), first_cut=1, second_cut=3),
        lora=lora,
        run_dir=str(tmp_path / "run"),
    )
    cuts = model_cuts(config)
    trunk = load_trunk_model(str(base), cuts)
    attach_lora(trunk, cuts, trunk_parts(config), seed=config.seed)
    client = load_client_model(str(base), cuts, trunk)
    attach_lora(client, cuts, client_parts(config), seed=config.seed)
    return config, client, trunk


@pytest.mark.parametrize("variety", VARIETIES)
def test_adapter_survives_the_round_trip_to_plain_peft(tmp_path: Path, variety: str) -> None:
    config, client, trunk = make(tmp_path, *VARIETIES[variety])
    initial, scales = initial_client_adapter(
        config.model.name, model_cuts(config), client_parts(config), seed=config.seed
    )
    own = adapter_state(client)
    assert own.keys() == initial.keys() and scales == lora_scales(client)
    assert all(torch.equal(own[name], initial[name]) for name in own)

    aggregator = AdapterAggregator("fedit", scales)
    aggregator.init(initial)
    for server_round in range(2):
        sent = aggregator.distribute()
        load_adapter_state(client, sent)
        updates = [
            AdapterUpdate(slot, sent, changed(adapter_state(client), 10 * server_round + slot), 1.0)
            for slot in range(2)
        ]
        aggregator.aggregate(updates)
    load_adapter_state(client, aggregator.distribute())
    load_adapter_state(trunk, changed(adapter_state(trunk), 7))

    run = RunDirectory.create(config)
    run.write_adapter("client", adapter_state(client))
    run.write_adapter("trunk", adapter_state(trunk))
    plain = AutoModelForCausalLM.from_pretrained(config.model.name)
    without = plain(**padded_batch()).logits.detach()
    peft = PeftModel.from_pretrained(plain, str(export_adapter(run.path, tmp_path / "out"))).eval()
    expected = client.eval()(**padded_batch()).logits
    torch.testing.assert_close(peft(**padded_batch()).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-2


def test_patterns_give_the_longest_matching_name_its_rank_and_alpha(tmp_path: Path) -> None:
    _, client, _ = make(tmp_path, LoraConfigs(top=PATTERNS), True)
    state, scales = adapter_state(client), lora_scales(client)
    ranks = {name: state[f"model.layers.3.{name}.lora_A.weight"].shape[0] for name in _NAMES}
    assert ranks == {"self_attn.q_proj": 2, "mlp.up_proj": 3, "self_attn.v_proj": 4}
    found = {name: scales[f"model.layers.3.{name}"] for name in _NAMES}
    assert found == {"self_attn.q_proj": 3.0, "mlp.up_proj": 2.0, "self_attn.v_proj": 5.0}


_NAMES = ("self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj")


def test_gaussian_init_has_pefts_spread(tmp_path: Path) -> None:
    _, client, _ = make(tmp_path, LoraConfigs(top=LORA(r=16, init="gaussian")), True)
    a = adapter_state(client)["model.layers.3.mlp.down_proj.lora_A.weight"]
    assert a.std().item() == pytest.approx(1 / 16, rel=0.1)


def test_fingerprint_tells_patterns_apart(tmp_path: Path) -> None:
    config, _, _ = make(tmp_path, LoraConfigs(), True)
    other = replace(config, lora=LoraConfigs(top=PATTERNS))
    mine, theirs = fingerprint(config), fingerprint(other)
    assert [name for name in mine if mine[name] != theirs[name]] == ["lora.top"]


def test_pattern_that_matches_nothing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.top\.rank-pattern names q_prj"):
        make(tmp_path, LoraConfigs(top=LORA(rank_pattern="q_prj=2")), True)


@pytest.mark.parametrize("pattern", ["q_proj", "q_proj=", "q_proj=-1", "q_proj=2.5"])
def test_pattern_that_is_malformed_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="rank-pattern"):
        LORA(rank_pattern=pattern)


@pytest.mark.parametrize("option", ["init-lora-weights", "lora-bias", "layer-replication", "use-qalora"])
def test_option_that_cannot_be_aggregated_is_refused_by_name(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.top\.{option} is not supported: .+"):
        parse_run_config({f"lora.top.{option}": True})
