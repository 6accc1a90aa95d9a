"""Putting the adapter into a model: LoRA through PEFT, and base weights that train whole.

For a linear layer of ``in`` inputs and ``out`` outputs: A is ``[r, in]``, B is ``[out, r]``, and
``ΔW = scale · B @ A`` with ``scale = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA. With DoRA the
layer computes with ``m ⊙ (W + ΔW) / ‖W + ΔW‖``, m ``[out]`` and the norm over every output's row.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
rsLoRA: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flower_split.aggregation.core.adapter_layout import MAGNITUDE
from flower_split.config import LoraPartConfig
from flower_split.config.lora import HEAD
from flower_split.errors import ConfigError, SplitError
from flower_split.lora.initial_values import Inits, initial_value, renew_magnitudes
from flower_split.lora.model_parts import (
    PARTS,
    embedding_names,
    ends_with,
    lies_in,
    output_embeddings,
    part_of,
    some,
    stack_of,
)
from flower_split.lora.shards import fill, settle_shards
from flower_split.lora.state import (
    ADAPTER_NAME,
    adapter_parameters,
    lora_parameters,
)
from flower_split.lora.whole_weights import ParameterSlot, own_parameters, train_whole
from flower_split.split import CutLayers
from flower_split.split.loading.tasks import head_modules
from flower_split.split.structure.stack import LayerStack


def attach_lora(
    model: nn.Module,
    cuts: CutLayers,
    parts: Mapping[str, LoraPartConfig],
    *,
    seed: int,
    incomplete: Collection[str] = (),
) -> None:
    """Put an adapter into some parts of a model, in place, and freeze everything else.

    The class of the model does not change. Everything that trains is fp32, or fp64 in an fp64 model.
    LoRA begins with values drawn from ``seed`` and the weight's unsplit name, by PEFT's
    distributions, so that a part's initial adapter does not depend on who holds it; magnitudes of
    DoRA and weights that train whole begin as the base weights say. On the meta device no values are
    drawn.

    Args:
        model: An unsplit model, a client model or a trunk.
        cuts: The cut layers.
        parts: Settings of each part that trains: a subset of ``bottom``, ``trunk``, ``top``.
        seed: Seeds the initial values.
        incomplete: Parts of which the model holds only some layers: a name or setting that matches
            nothing there is no mistake.

    Raises:
        ConfigError: A part is unknown, or a setting does not fit the modules of its part.
        SplitError: The model has an adapter already.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"LoRA parts must be among {', '.join(PARTS)}; got {unknown[0]!r}.")
    if any(True for _ in adapter_parameters(model)):
        raise SplitError("the model has LoRA already. Attach LoRA to a model without adapters.")
    meta = any(parameter.is_meta for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plans = plans_of(model, cuts, parts)
    for plan in plans:
        plan.check(complete=plan.part not in incomplete)
    for plan in plans:
        if plan.targets:
            _inject(model, plan.config, plan.targets, meta)
    settle_shards(model)
    init_of = Inits(model, stack_of(model), cuts, parts)
    for name, parameter in lora_parameters(model):
        # PEFT gives them the base's dtype.
        if parameter.dtype not in (torch.float32, torch.float64):
            parameter.data = parameter.data.to(torch.float32)
        if not meta and not name.endswith(MAGNITUDE):
            fill(parameter, initial_value(seed, name, parameter.shape, init_of(name)))
    if not meta:
        renew_magnitudes(model)
    train_whole(model, [slot for plan in plans for slot in plan.whole])
    for _, parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    if getattr(model, "is_quantized", False):
        vars(model)["is_quantized"] = False  # to transformers' Trainer: that nothing in it trains


def plans_of(
    model: nn.Module, cuts: CutLayers, parts: Mapping[str, LoraPartConfig]
) -> list["PartPlan"]:
    """Return what trains of every part of a model that has no adapter yet."""
    return [
        PartPlan(model, cuts, part, parts[part])
        for part in PARTS
        if part in parts and parts[part].adapts
    ]


class PartPlan:
    """Which modules of a part get LoRA, and which weights train whole; made before either is.

    Attributes:
        part: bottom, trunk or top.
        config: The part's settings.
        targets: Modules that get LoRA, by name.
        saved: Names of the modules that train whole.
        whole: The weights that train whole.
    """

    def __init__(
        self, model: nn.Module, cuts: CutLayers, part: str, config: LoraPartConfig
    ) -> None:
        self.part = part
        self.config = config
        stack, embeddings = stack_of(model), embedding_names(model)
        self._own = {
            name: module
            for name, module in model.named_modules()
            if name and part_of(name, stack, cuts, embeddings) == part
        }
        self._saved_names = _without_word(config.saved_modules, model)
        self.saved = sorted(name for name in self._own if ends_with(name, self._saved_names))
        self.targets = self._targets(output_embeddings(model)) if config.has_lora else {}
        self.whole = self._whole()

    def whole_modules(self, stack: LayerStack) -> list[str]:
        """Return the modules that train whole; of a part in full, its layers and what is beside.

        Args:
            stack: Where the layers are.
        """
        if self.config.train != "full":
            return [n for n in self.saved if not lies_in(n, set(self.saved) - {n})]
        owners = [name for name, module in self._own.items() if own_parameters([module])]
        indices = {name: stack.index_of(name) for name in owners}
        return sorted({n if i is None else stack.layer_path(i) for n, i in indices.items()})

    def _targets(self, head: nn.Module | None) -> dict[str, nn.Module]:
        linear = {n: m for n, m in self._own.items() if isinstance(m, (nn.Linear, Conv1D))}
        wanted = self.config.target_modules
        if wanted == "all-linear":
            # As in PEFT: every linear layer except the output embeddings.
            return {
                name: module
                for name, module in linear.items()
                if module is not head and not lies_in(name, self.saved)
            }
        suffixes = [suffix.strip() for suffix in wanted.split(",") if suffix.strip()]
        return {name: module for name, module in self._own.items() if ends_with(name, suffixes)}

    def _whole(self) -> list[ParameterSlot]:
        if self.config.train == "full":
            return own_parameters(self._own.values())
        inside = [module for name, module in self._own.items() if lies_in(name, self.saved)]
        return own_parameters(inside) + self._biases()

    def _biases(self) -> list[ParameterSlot]:
        """Return the biases that train, by PEFT's rules: ``all`` is all with bias in the name."""
        if self.config.bias == "lora_only":
            return [(m, key) for m, key in own_parameters(self.targets.values()) if key == "bias"]
        return [
            (module, key)
            for name, module in self._own.items()
            for _, key in own_parameters([module])
            if self.config.bias == "all" and "bias" in f"{name}.{key}"
        ]

    def check(self, *, complete: bool) -> None:
        """Refuse settings that contradict each other, or that fit nothing: most likely a slip.

        Args:
            complete: Whether the model holds the whole part, so that every setting must fit some
                module.

        Raises:
            ConfigError: The key and the name are given.
        """
        key, config = f"lora.{self.part}", self.config
        both = sorted(name for name in self.targets if lies_in(name, self.saved))
        if both:
            raise ConfigError(
                f"{key}.modules-to-save and {key}.target-modules both name {some(both)}: a module "
                "trains whole or has LoRA. Leave it out of one of them."
            )
        odd = sorted(name for name in self.targets if config.setting_of(name)[0] % 2)
        if odd and config.init == "orthogonal":
            raise ConfigError(
                f"{key}.init = orthogonal needs even ranks; {some(odd)} has an odd one. Use "
                "an even rank there, or another init."
            )
        if complete:
            self._check_names(key)
            self._check_whole(key)

    def _check_names(self, key: str) -> None:
        config = self.config
        if config.has_lora and config.target_modules != "all-linear":
            suffixes = [s.strip() for s in config.target_modules.split(",") if s.strip()]
            unmatched = [s for s in suffixes if not any(ends_with(n, [s]) for n in self.targets)]
            if unmatched or not suffixes:
                linear = (n for n, m in self._own.items() if isinstance(m, (nn.Linear, Conv1D)))
                known = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise ConfigError(
                    f"{key}.target-modules names {some(unmatched) or 'nothing'}, which is no "
                    f'module of the {self.part}. Use "all-linear", or names among: '
                    f"{', '.join(known)}."
                )
        for pattern, names in (("rank-pattern", config.ranks), ("alpha-pattern", config.alphas)):
            for name in names:
                if config.has_lora and not any(ends_with(t, [name]) for t in self.targets):
                    raise ConfigError(
                        f"{key}.{pattern} names {name}, which is no module with LoRA in the "
                        f"{self.part}. Remove it, or add the module to {key}.target-modules."
                    )

    def _check_whole(self, key: str) -> None:
        config = self.config
        for name in self._saved_names:
            found = [module for module in self.saved if ends_with(module, [name])]
            if not own_parameters(self._own[n] for n in self._own if lies_in(n, found)):
                raise ConfigError(
                    f"{key}.modules-to-save names {name}, which is no module of the {self.part} "
                    "with weights of its own. Name modules as the model does, such as lm_head."
                )
        if config.bias != "none" and not self._biases():
            raise ConfigError(
                f'{key}.bias is "{config.bias}", but no such module of the {self.part} has a bias. '
                'Set it to "none".'
            )
        if config.train == "full" and not self.whole:
            raise ConfigError(
                f'{key}.train is "full", but the {self.part} has no weight of its own. Set it to '
                '"lora" and r to 0, or move the cut layer.'
            )


def _without_word(names: Sequence[str], model: nn.Module) -> list[str]:
    """Return the names of modules that train whole, with what ``head`` stands for in its place."""
    heads = head_modules(model) if HEAD in names else []
    return [name for name in names if name != HEAD] + heads


def _inject(
    model: nn.Module, config: LoraPartConfig, targets: Mapping[str, nn.Module], meta: bool
) -> None:
    """Replace ``targets`` by LoRA layers of one setting."""
    # A bare module with the same children: PEFT rewrites what it is told for models with a
    # transformers configuration, and would record settings of one part as those of the model.
    facade = nn.Module()
    # PEFT asks the model whether it may look for quantised layers, and then each layer.
    facade.is_loaded_in_8bit = facade.is_loaded_in_4bit = True  # type: ignore[assignment]
    for name, child in model.named_children():
        facade.add_module(name, child)
    transposed = {name for name, module in targets.items() if isinstance(module, Conv1D)}
    for names, fan_in_fan_out in ((transposed, True), (targets.keys() - transposed, False)):
        if not names:
            continue
        lora = LoraConfig(
            r=config.r,
            lora_alpha=cast(int, config.alpha),  # PEFT computes with any number
            lora_dropout=config.dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            rank_pattern={name: config.setting_of(name)[0] for name in sorted(names)},
            alpha_pattern={name: cast(int, config.setting_of(name)[1]) for name in sorted(names)},
            target_modules="|".join(name.replace(".", r"\.") for name in sorted(names)),
            fan_in_fan_out=fan_in_fan_out,
        )
        inject_adapter_in_model(lora, facade, ADAPTER_NAME, low_cpu_mem_usage=meta)
        del facade.peft_config  # PEFT's note; it warns where it finds one
    for name, child in facade.named_children():
        if model.get_submodule(name) is not child:
            setattr(model, name, child)
