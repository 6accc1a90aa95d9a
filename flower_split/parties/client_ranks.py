"""A client's own LoRA rank and scale: who has which, and what they make of the run's settings.

A client of little memory trains a LoRA of smaller rank than ``lora.bottom.r`` and ``lora.top.r``, at
which the global adapter is kept; it receives the part of the global ΔW that fits, and what it
returns is aggregated at its rank. Its rank is the first of these that says something:

1. its SuperNode's ``--node-config 'lora-rank=4'``, with ``lora-alpha=16`` if it wants its own;
2. ``lora.rank-by-memory = "8=4, 16=8"`` for a node that declares ``memory=12`` (GiB): the first bound
   that holds, here 8; above all bounds the run's;
3. ``lora.rank-by-partition = "0=2, 3=4"``, for simulations;
4. the run's.

Ranks of ``rank-pattern`` shrink in proportion, to at least 1. By ``lora.client-scale`` a smaller rank
keeps alpha, so that ΔW = alpha / rᵢ · B @ A as when PEFT's ``r`` alone is changed (and as FlexLoRA and
HetLoRA do it), or keeps the scale alpha / r of the run. Either is exact: factors are rewritten for the
scale of the client that receives them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from flower_split.aggregation.core.adapter_layout import factors_from, factors_into, layout_of
from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.aggregation.core.method import at_scale, padded
from flower_split.config import LoraPartConfig, RunConfig
from flower_split.errors import ConfigError
from flower_split.lora import embedding_names, part_of
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import empty_model
from flower_split.split.structure.stack import find_stack


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnLora:
    """Per-client LoRA overrides."""

    rank: int = 0  # of the parts whose rank is above; 0: the run's
    alpha: float = 0.0  # 0: by lora.client-scale

    def __str__(self) -> str:
        """Return the text for the log."""
        parts = [f"rank {self.rank}"] * bool(self.rank) + [f"alpha {self.alpha:g}"] * bool(
            self.alpha
        )
        return " ".join(parts) or "the run's"


def own_lora(
    config: RunConfig, partition_id: int, node_config: Mapping[str, object] | None = None
) -> OwnLora:
    """Return what the run and a node say of one client's rank; see the module.

    Raises:
        ConfigError: A value of the node config is no positive number, or the rank is too large.
    """
    node, who = node_config or {}, f"the node config of partition {partition_id}"
    memory = _number(node, "memory", who)
    ranks = config.lora.ranks_by_memory if memory else {}
    rank = int(_number(node, "lora-rank", who, whole=True))
    if rank:
        config.lora.check_rank(rank, f"{who} (lora-rank)")
    elif ranks:
        rank = next((rank for bound, rank in ranks.items() if memory <= bound), 0)
    else:
        rank = config.lora.ranks_by_partition.get(partition_id, 0)
    return OwnLora(rank=rank, alpha=_number(node, "lora-alpha", who))


def _number(node: Mapping[str, object], key: str, who: str, *, whole: bool = False) -> float:
    """Return a positive number of the node config; 0: it is not there."""
    if key not in node:
        return 0.0
    value = node[key]
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(
            f"{who} has {key} = {value!r}; it must be {'an integer' if whole else 'a number'} above "
            f"0, as in: flower-supernode … --node-config '{key}=8 …'."
        )
    return float(value)


def at_own_rank(
    parts: Mapping[str, LoraPartConfig], own: OwnLora, client_scale: str
) -> dict[str, LoraPartConfig]:
    """Return the LoRA settings of the parts as one client trains them.

    Args:
        parts: The run's settings.
        own: The client's.
        client_scale: ``lora.client-scale``: what a smaller rank keeps, ``alpha`` or ``scale``.
    """
    return {name: _at_own_rank(part, own, client_scale) for name, part in parts.items()}


def _at_own_rank(part: LoraPartConfig, own: OwnLora, client_scale: str) -> LoraPartConfig:
    if not part.has_lora:
        return part
    rank = min(own.rank or part.r, part.r)
    ranks = {name: max(1, int(old) * rank // part.r) for name, old in part.ranks.items()}
    small = replace(part, r=rank, rank_pattern=_text(ranks))
    if own.alpha:
        alphas = {name: old * own.alpha / part.alpha for name, old in part.alphas.items()}
        return replace(small, alpha=own.alpha, alpha_pattern=_text(alphas))
    if client_scale == "alpha" or rank == part.r:
        return small
    # Every name of either pattern gets an alpha, as the longest of both decides for a module.
    names = sorted(part.ranks.keys() | part.alphas.keys())
    alphas = {name: _same_scale(part, small, name) for name in names}
    return replace(
        small, alpha=part.alpha * _shrunk(part, rank, part.r), alpha_pattern=_text(alphas)
    )


def _same_scale(part: LoraPartConfig, small: LoraPartConfig, name: str) -> float:
    """Return the alpha of a module at its smaller rank, for the scale it has at the run's."""
    rank, alpha = part.setting_of(name)
    return alpha * _shrunk(part, small.setting_of(name)[0], rank)


def _shrunk(part: LoraPartConfig, rank: int, old: int) -> float:
    return (rank / old) ** (0.5 if part.use_rslora else 1)


def _text(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def rank_specs(
    config: RunConfig, own: Mapping[int, OwnLora], modules: Iterable[str]
) -> dict[int, AdapterSpec]:
    """Return ranks and scales of every client whose LoRA differs from the run's, by slot.

    Args:
        config: The run's configuration.
        own: Slot to what the client has of its own.
        modules: Names of the modules with LoRA in the global adapter.
    """
    if all(item == OwnLora() for item in own.values()):
        return {}
    model = empty_model(ModelSource.of(config.model))
    stack, embeddings = find_stack(model), embedding_names(model)
    part_by_module = {
        module: part_of(module, stack, model_cuts(config), embeddings) for module in modules
    }
    specs: dict[int, AdapterSpec] = {}
    for slot, item in own.items():
        parts = all_parts(config)
        mine = at_own_rank(parts, item, config.lora.client_scale)
        if mine != parts:
            specs[slot] = AdapterSpec(
                ranks=_unless_same(
                    {m: mine[part].setting_of(m)[0] for m, part in part_by_module.items()},
                    {m: parts[part].setting_of(m)[0] for m, part in part_by_module.items()},
                ),
                scales=_unless_same(
                    {m: mine[part].scale_of(m) for m, part in part_by_module.items()},
                    {m: parts[part].scale_of(m) for m, part in part_by_module.items()},
                ),
            )
    return specs


Value = TypeVar("Value", int, float)


def _unless_same(mine: dict[str, Value], the_runs: dict[str, Value]) -> dict[str, Value] | None:
    same = all(math.isclose(value, the_runs[name], rel_tol=1e-9) for name, value in mine.items())
    return None if same else mine


def widened(
    state: Mapping[str, Tensor],
    scales: Mapping[str, float],
    reference: Mapping[str, Tensor],
    reference_scales: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return the same ΔW in the ranks and scales of another adapter, which are at least as large.

    Args:
        state: An adapter, by tensor name.
        scales: Its scale of ΔW by module.
        reference: An adapter with the same names.
        reference_scales: Its scales.

    Returns:
        The tensors, with rows and columns of 0 up to the reference's ranks.
    """
    layout, own = layout_of(reference), layout_of(state)
    result = {name: state[name].clone() for name in own.others}
    for module, suffixes in own.modules.items():
        factors = at_scale(
            factors_from(state, module, suffixes, scales[module]), reference_scales[module]
        )
        rank = factors_from(reference, module, layout.modules[module], 1.0).rank
        factors_into(result, module, layout, padded(factors, rank))
    return {name: result[name] for name in sorted(result)}
