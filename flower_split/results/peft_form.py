"""Whole modules, biases and magnitudes: the parts of an adapter beside its LoRA factors.

PEFT has one setting for a whole adapter where the parts of a split model have one each. So a module
with LoRA beside others with DoRA gets the magnitudes with which DoRA changes nothing, and a bias is
in the file where it trained and nowhere else. A weight that trained in two places (tied embeddings)
is written for both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flower_split.aggregation.core.adapter_layout import MAGNITUDE
from flower_split.config import RunConfig
from flower_split.errors import RunDirectoryError
from flower_split.lora.attach import plans_of
from flower_split.lora.model_parts import lies_in
from flower_split.parties.parts import all_parts, client_parts, model_cuts
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import load_whole_model
from flower_split.split.structure.stack import find_stack


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """PEFT settings that do not follow from the LoRA factors."""

    whole_modules: list[str] = field(default_factory=list)  # PEFT's modules_to_save, by full name
    bias: str = "none"  # PEFT's bias
    use_dora: bool = False


def peft_form(config: RunConfig, state: Mapping[str, Tensor], model: PreTrainedModel) -> PeftForm:
    """Return the form of the adapter in ``state``.

    Args:
        config: The run's configuration.
        state: Tensors of all parts, by name.
        model: The whole base model, without an adapter; on the meta device will do.

    Raises:
        RunDirectoryError: A part in full has weights that no module of its own holds.
    """
    stack, parts = find_stack(model), all_parts(config)
    if config.mode != "joint" or config.trunk.train == "full":
        parts = client_parts(config)
    whole = {name for plan in plans_of(model, model_cuts(config), parts)
             for name in plan.whole_modules(stack)}  # fmt: skip
    if config.trunk.train == "full" and config.mode == "joint":
        cuts = model_cuts(config)
        whole |= {stack.layer_path(index) for index in range(cuts.first, cuts.second)}
    around = sorted(name for name in whole if lies_in(stack.path, [name]))
    if around:
        raise RunDirectoryError(
            f"weights that trained lie directly in {around[0]}, around all layers; PEFT can save "
            "that module only as a whole. Use lora.*.modules-to-save instead of train = full."
        )
    biases = {part.bias for part in parts.values()}
    return PeftForm(
        whole_modules=sorted(whole),
        bias=next((kind for kind in ("all", "lora_only") if kind in biases), "none"),
        use_dora=any(name.endswith(MAGNITUDE) for name in state),
    )


def tied_copies(
    state: Mapping[str, Tensor], form: PeftForm, model: PreTrainedModel
) -> dict[str, Tensor]:
    """Return the tensors of whole modules whose weight is in ``state`` under the name that it is tied to.

    Args:
        state: Tensors of all parts, by name.
        form: Of the same adapter.
        model: The whole base model, its weights tied.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        alias: state[known[0]].clone()
        for group in names.values()
        if (known := [name for name in group if name in state])
        for alias in group
        if alias not in state and lies_in(alias, form.whole_modules)
    }


def neutral_magnitudes(
    source: ModelSource, state: Mapping[str, Tensor], scales: Mapping[str, float]
) -> dict[str, Tensor]:
    """Compute magnitudes for modules without DoRA, with which it computes what LoRA computes: ‖W + ΔW‖.

    The base weights are read.

    Args:
        source: The base model.
        state: Tensors of all parts, by name.
        scales: ΔW scale of every module with LoRA.
    """
    modules = [module for module in scales if module + MAGNITUDE not in state]
    if not modules:
        return {}
    base = load_whole_model(source)
    magnitudes: dict[str, Tensor] = {}
    for module in modules:
        layer = base.get_submodule(module)
        if isinstance(layer, nn.Embedding):
            kind: DoraLinearLayer = DoraEmbeddingLayer(fan_in_fan_out=True)  # type: ignore[no-untyped-call]
            names = (".lora_embedding_A", ".lora_embedding_B")
        else:
            kind = DoraLinearLayer(fan_in_fan_out=isinstance(layer, Conv1D))  # type: ignore[no-untyped-call]
            names = (".lora_A.weight", ".lora_B.weight")
        a, b = (state[module + name] for name in names)
        with torch.no_grad():
            kind.update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=scales[module])
        magnitudes[module + MAGNITUDE] = cast(Tensor, kind.weight).detach().float().cpu()
    return magnitudes
