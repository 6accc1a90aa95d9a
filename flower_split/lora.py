"""LoRA on the three parts of a model, through PEFT, under the unsplit model's names.

For a linear layer of ``in`` inputs and ``out`` outputs: A is ``[r, in]``, B is ``[out, r]``, and
``ΔW = scale · B @ A`` with ``scale = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
rsLoRA: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flower_split.config import LoraPartConfig
from flower_split.errors import ConfigError, SplitError
from flower_split.split import CutLayers
from flower_split.split.load import empty_model
from flower_split.split.stack import LayerStack, find_stack

ADAPTER_NAME = "default"
PARTS = ("bottom", "trunk", "top")


def attach_lora(
    model: nn.Module,
    cuts: CutLayers,
    parts: Mapping[str, LoraPartConfig],
    *,
    seed: int,
    incomplete: Collection[str] = (),
) -> None:
    """Inject LoRA into some parts of a model, in place, and freeze everything else.

    The class of the model does not change. LoRA weights are fp32. B begins at zero and A at values
    drawn from ``seed`` and the weight's unsplit name, kaiming-uniform as in PEFT, so that a part's
    initial adapter does not depend on who holds it. On the meta device no values are drawn.

    Args:
        model: An unsplit model, a client model or a trunk.
        cuts: The cut layers.
        parts: Settings of each part that gets LoRA: a subset of ``bottom``, ``trunk``, ``top``. A
            part whose rank is 0 gets none.
        seed: Of the initial values.
        incomplete: Parts of which the model holds only some layers: a name or pattern that matches
            nothing there is no mistake.

    Raises:
        ConfigError: A part is unknown, or its target modules match nothing in it.
        SplitError: The model has LoRA already.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"LoRA parts must be among {', '.join(PARTS)}; got {unknown[0]!r}.")
    if any(True for _ in _lora_layers(model)):
        raise SplitError("the model has LoRA already. Attach LoRA to a model without adapters.")
    stack = stack_of(model)
    meta = any(parameter.is_meta for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in PARTS:
        config = parts.get(part)
        if config is not None and config.r > 0:
            targets = _targets(model, stack, cuts, part, config, strict=part not in incomplete)
            _inject(model, config, targets, meta)
    init_of = _Inits(model, stack, cuts, parts)
    for name, parameter in _lora_parameters(model):
        parameter.data = parameter.data.to(torch.float32)  # PEFT gives them the base's dtype
        if not meta:
            with torch.no_grad():
                parameter.copy_(_initial_value(seed, name, parameter.shape, init_of(name)))
        parameter.requires_grad_(True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA weights: fp32 CPU copies, sorted by unsplit name, as PEFT saves them.

    Names are ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
    """
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in sorted(_lora_parameters(model))
    }


def set_trainable(model: nn.Module, names: Collection[str] | None) -> None:
    """Let only these LoRA weights require grad; None: all of them.

    Args:
        model: A model with LoRA attached.
        names: As :func:`adapter_state` names them; some aggregation methods freeze a factor.
    """
    for name, parameter in _lora_parameters(model):
        parameter.requires_grad_(names is None or name in names)


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy LoRA weights into a model; names and shapes must be exactly the model's.

    Args:
        model: A model with LoRA attached.
        state: As :func:`adapter_state` returns it.

    Raises:
        SplitError: A name is missing or unexpected, or a shape differs.
    """
    own = dict(_lora_parameters(model))
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    problems = [
        f"{kind}: {_first(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
        )
        if names
    ]
    if problems:
        raise SplitError(
            f"the adapter does not fit this model ({'; '.join(problems)}). Use the adapter of a "
            "run with the same model, cut layers and LoRA settings."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def lora_scales(model: nn.Module) -> dict[str, float]:
    """The scale of ΔW of every module with LoRA, by unsplit module name, sorted."""
    return {name: float(layer.scaling[ADAPTER_NAME]) for name, layer in sorted(_lora_layers(model))}


def initial_client_adapter(
    name_or_path: str,
    cuts: CutLayers,
    parts: Mapping[str, LoraPartConfig],
    *,
    seed: int,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A client's adapter as :func:`attach_lora` begins it, without reading base weights.

    Args:
        name_or_path: Local directory or hub id; only its configuration is read.
        cuts: The cut layers.
        parts: As for :func:`attach_lora`; a client's parts are ``bottom`` and ``top``.
        seed: As for :func:`attach_lora`.
        dtype: Of the base model; LoRA is fp32 whatever it is, so this changes nothing.
        revision: Hub revision.
        attn_implementation: As for loading; it may decide which modules there are.

    Returns:
        What :func:`adapter_state` and :func:`lora_scales` would return for a client.

    Raises:
        SplitError: The cuts do not fit the model.
        ConfigError: As for :func:`attach_lora`.
    """
    model = empty_model(
        name_or_path, cuts, revision=revision, attn_implementation=attn_implementation
    )
    attach_lora(model, cuts, parts, seed=seed)
    init_of = _Inits(model, stack_of(model), cuts, parts)
    state = {
        name: _initial_value(seed, name, parameter.shape, init_of(name))
        for name, parameter in sorted(_lora_parameters(model))
    }
    return state, lora_scales(model)


def stack_of(model: nn.Module) -> LayerStack:
    """Where the layers of an unsplit model, a client model or a trunk are."""
    stack = getattr(model, "stack", None)
    return stack if isinstance(stack, LayerStack) else find_stack(model)


def part_of(name: str, stack: LayerStack, cuts: CutLayers, embeddings: frozenset[str]) -> str:
    """The part that owns module ``name``.

    Outside the stack of layers, embeddings are the bottom's and everything else is the top's.
    """
    index = stack.index_of(name)
    if index is not None:
        return cuts.part_of(index)
    return "bottom" if name in embeddings else "top"


def embedding_names(model: nn.Module) -> frozenset[str]:
    """The names of a model's embeddings."""
    return frozenset(n for n, module in model.named_modules() if isinstance(module, nn.Embedding))


def _targets(
    model: nn.Module,
    stack: LayerStack,
    cuts: CutLayers,
    part: str,
    config: LoraPartConfig,
    *,
    strict: bool,
) -> dict[str, nn.Module]:
    """The modules of ``part`` that get LoRA, by name; ``strict``: every setting must match some."""
    embeddings = embedding_names(model)
    own = {
        name: module
        for name, module in model.named_modules()
        if name and part_of(name, stack, cuts, embeddings) == part
    }
    linear = {name: m for name, m in own.items() if isinstance(m, (nn.Linear, Conv1D))}
    wanted = config.target_modules
    if wanted == "all-linear":
        # As in PEFT: every linear layer except the output embeddings.
        head = output_embeddings(model)
        found: dict[str, nn.Module] = {n: m for n, m in linear.items() if m is not head}
        if strict:
            _check_patterns(part, config, found)
        return found
    suffixes = [suffix.strip() for suffix in wanted.split(",") if suffix.strip()]
    found = {
        name: module
        for name, module in own.items()
        if any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
    }
    if not strict:
        return found
    _check_patterns(part, config, found)
    unmatched = [s for s in suffixes if not any(n == s or n.endswith("." + s) for n in found)]
    if unmatched or not suffixes:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            f"lora.{part}.target-modules names {_first(unmatched) or 'nothing'}, which is no "
            f'module of the {part}. Use "all-linear", or names among: {", ".join(known)}.'
        )
    return found


def _check_patterns(part: str, config: LoraPartConfig, targets: Mapping[str, nn.Module]) -> None:
    """Refuse a pattern that matches nothing: most likely it is misspelt."""
    for key, names in (("rank-pattern", config.ranks), ("alpha-pattern", config.alphas)):
        for name in names:
            if not any(target == name or target.endswith("." + name) for target in targets):
                raise ConfigError(
                    f"lora.{part}.{key} names {name}, which is no module with LoRA in the {part}."
                )


class _Inits:
    """How the A of every LoRA weight begins, by the weight's name."""

    def __init__(
        self,
        model: nn.Module,
        stack: LayerStack,
        cuts: CutLayers,
        parts: Mapping[str, LoraPartConfig],
    ) -> None:
        self._stack, self._cuts, self._parts = stack, cuts, parts
        self._embeddings = frozenset(
            name
            for name, layer in _lora_layers(model)
            if isinstance(layer.get_base_layer(), nn.Embedding)
        )

    def __call__(self, name: str) -> str:
        module = name.split(".lora_", 1)[0]
        part = self._parts.get(part_of(module, self._stack, self._cuts, self._embeddings))
        return part.init if part is not None else "kaiming"


def _inject(
    model: nn.Module, config: LoraPartConfig, targets: Mapping[str, nn.Module], meta: bool
) -> None:
    """Replace ``targets`` by LoRA layers of one setting."""
    # A bare module with the same children: PEFT rewrites what it is told for models with a
    # transformers configuration, and would record settings of one part as those of the model.
    facade = nn.Module()
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


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def _lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA parameters under the names that PEFT saves them by."""
    for module_name, layer in _lora_layers(model):
        for name, parameter in cast(nn.Module, layer).named_parameters():
            if name.startswith("lora_") and f".{ADAPTER_NAME}" in name:
                yield f"{module_name}.{name.replace(f'.{ADAPTER_NAME}', '')}", parameter


def _initial_value(seed: int, name: str, shape: torch.Size, init: str) -> Tensor:
    """The initial value of the LoRA weight ``name``, fp32 on CPU; PEFT's distributions."""
    if name.endswith(("lora_B.weight", "lora_embedding_A")):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith("lora_embedding_B"):
        return torch.randn(shape, generator=generator)
    value = torch.empty(shape)
    if init == "gaussian":
        return nn.init.normal_(value, std=1 / shape[0], generator=generator)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _first(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
