"""A client's own rank: who says it, and what it makes of the settings, with PEFT as the reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from flower_split.config import LoraPartConfig, RunConfig, parse_run_config
from flower_split.errors import ConfigError
from flower_split.lora import adapter_state, attach_lora, lora_scales
from flower_split.parties.client_ranks import OwnLora, at_own_rank, own_lora, rank_specs, widened
from flower_split.split import CutLayers
from tests.support.tiny_models import tiny_model

CUTS = CutLayers(1, 3)
PATTERNS = LoraPartConfig(
    r=8,
    alpha=16.0,
    target_modules="q_proj,v_proj,up_proj,down_proj",
    rank_pattern="q_proj=4, mlp.up_proj=12",
    alpha_pattern="up_proj=6, layers.0.mlp.up_proj=3",
)


def run_config(**changes: object) -> RunConfig:
    keys = {"lora." + name.replace("__", ".").replace("_", "-"): v for name, v in changes.items()}
    return parse_run_config(keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "partition", "rank", "alpha"),
    [
        ({}, 5, 0, 0.0),
        ({}, 1, 3, 0.0),  # by partition
        ({"memory": 8}, 5, 2, 0.0),  # on the bound
        ({"memory": 8.5}, 5, 4, 0.0),
        ({"memory": 17}, 1, 0, 0.0),  # above all bounds: the run's, whatever the partition
        ({"memory": 4, "lora-rank": 7}, 1, 7, 0.0),  # the node's own rank comes first
        ({"lora-rank": 7, "lora-alpha": 5}, 1, 7, 5.0),
        ({"lora-alpha": 5.5}, 5, 0, 5.5),
    ],
)
def test_rank_is_the_first_that_is_said(
    node: dict[str, object], partition: int, rank: int, alpha: float
) -> None:
    config = run_config(rank_by_memory="16=4, 8=2", rank_by_partition="1=3")
    assert own_lora(config, partition, node) == OwnLora(rank=rank, alpha=alpha)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"lora-rank": 9}, r"partition 3 \(lora-rank\) has the LoRA rank 9; .* from 1 to .* 8"),
        ({"lora-rank": 0}, "lora-rank = 0; it must be an integer above 0"),
        ({"lora-rank": 2.5}, "lora-rank = 2.5"),
        ({"lora-rank": True}, "lora-rank = True"),
        ({"lora-alpha": -1.0}, "lora-alpha = -1.0; it must be a number above 0"),
        ({"memory": "8GB"}, "memory = '8GB'"),
    ],
)
def test_invalid_node_config_is_named(node: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        own_lora(run_config(), 3, node)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_by_memory": "8=16"},
        {"rank_by_memory": "8"},
        {"rank_by_memory": "8=4, 8=2"},
        {"rank_by_memory": "nan=4"},
        {"rank_by_partition": "0=0"},
        {"rank_by_partition": "0.5=2"},
        {"rank_by_partition": "-1=2"},
        {"client_scale": "rank"},
    ],
)
def test_invalid_rule_is_refused_by_key(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="lora." + next(iter(changes)).replace("_", "-")):
        run_config(**changes)


def test_rank_is_never_above_a_parts_own() -> None:
    parts = {
        "bottom": LoraPartConfig(r=4),
        "top": LoraPartConfig(r=16),
        "none": LoraPartConfig(r=0),
    }
    found = at_own_rank(parts, OwnLora(rank=6), "alpha")
    assert [part.r for part in found.values()] == [4, 6, 0]
    assert found["bottom"] is parts["bottom"] or found["bottom"] == parts["bottom"]


def test_smaller_rank_keeps_alpha_as_peft_does() -> None:
    part = LoraPartConfig(r=8, alpha=12.0, target_modules="q_proj")
    small = at_own_rank({"bottom": part}, OwnLora(rank=2), "alpha")
    model = tiny_model("llama")
    attach_lora(model, CUTS, small, seed=0)
    reference = inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=12, target_modules=["q_proj"]), tiny_model("llama")
    )
    layer = reference.model.layers[0].self_attn.q_proj
    (scale,) = lora_scales(model).values()
    assert scale == layer.scaling["default"] == 6.0
    names = {name.split(".lora_")[1]: tuple(v.shape) for name, v in adapter_state(model).items()}
    assert names == {"A.weight": (2, 32), "B.weight": (32, 2)}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_smaller_rank_can_keep_the_scale_of_every_module(rank: int, use_rslora: bool) -> None:
    part = replace(PATTERNS, use_rslora=use_rslora)
    small = at_own_rank({"bottom": part}, OwnLora(rank=rank), "scale")
    full, own = tiny_model("llama"), tiny_model("llama")
    attach_lora(full, CUTS, {"bottom": part}, seed=0)
    attach_lora(own, CUTS, small, seed=0)
    assert lora_scales(own) == pytest.approx(lora_scales(full), rel=1e-12)
    shapes = {name: value.shape[0] for name, value in adapter_state(own).items() if "_A" in name}
    ranks = {name.split(".lora_")[0].rsplit(".", 1)[-1]: r for name, r in shapes.items()}
    assert ranks == {
        "q_proj": max(1, 4 * rank // 8),
        "v_proj": rank,
        "up_proj": max(1, 12 * rank // 8),
        "down_proj": rank,
    }


def test_own_alpha_scales_the_pattern_too() -> None:
    small = at_own_rank({"bottom": PATTERNS}, OwnLora(rank=4, alpha=8.0), "scale")["bottom"]
    assert small.setting_of("model.layers.0.self_attn.v_proj") == (4, 8.0)
    assert small.setting_of("model.layers.0.mlp.up_proj") == (6, 1.5)
    assert small.setting_of("model.layers.3.mlp.up_proj") == (6, 3.0)


def test_specs_are_what_the_clients_attach(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = parse_run_config(
        {
            "model.name": str(tmp_path),
            "model.first-cut": 1,
            "model.second-cut": 3,
            "lora.bottom.r": 4,
            "lora.top.r": 8,
            "lora.top.rank-pattern": "q_proj=2",
            "lora.top.use-rslora": True,
            "lora.client-scale": "scale",
        }
    )
    parts = {"bottom": config.lora.bottom, "top": config.lora.top}
    whole = tiny_model("llama")
    attach_lora(whole, CUTS, parts, seed=0)
    own = {0: OwnLora(rank=3), 1: OwnLora(), 2: OwnLora(rank=8), 3: OwnLora(alpha=2.0)}
    specs = rank_specs(config, own, lora_scales(whole))
    assert sorted(specs) == [0, 3]  # rank 8 is no other than the run's
    for slot, spec in specs.items():
        mine = tiny_model("llama")
        attach_lora(mine, CUTS, at_own_rank(parts, own[slot], "scale"), seed=0)
        scales, state = lora_scales(mine), adapter_state(mine)
        ranks = {name: state[f"{name}.lora_A.weight"].shape[0] for name in scales}
        if slot == 0:
            assert spec.ranks == ranks and spec.scales is None
        else:
            assert spec.scales == scales and spec.ranks is None


def test_widened_adapter_computes_the_same() -> None:
    part = LoraPartConfig(r=8, alpha=16.0)
    full, own = tiny_model("llama"), tiny_model("llama")
    attach_lora(full, CUTS, {"bottom": part, "top": part}, seed=0)
    small = at_own_rank({"bottom": part, "top": part}, OwnLora(rank=3), "alpha")
    attach_lora(own, CUTS, small, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in adapter_state(own).items()
    }
    reference = adapter_state(full)
    found = widened(state, lora_scales(own), reference, lora_scales(full))
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in reference.items()}
    for name, scale in lora_scales(own).items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        expected = scale * state[b].double() @ state[a].double()
        delta = lora_scales(full)[name] * found[b].double() @ found[a].double()
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)
