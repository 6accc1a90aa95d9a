"""An adapter's tensors, read and written under the names that PEFT saves them by.

``<module>.lora_A.weight`` and ``<module>.lora_B.weight``; DoRA's ``<module>.lora_magnitude_vector``;
weights that train whole by their own names, where a bias below LoRA is ``<module>.base_layer.bias``.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flower_split.aggregation.core.adapter_layout import MAGNITUDE
from flower_split.errors import SplitError
from flower_split.lora.model_parts import some
from flower_split.lora.whole_weights import base_weights, saved_name

ADAPTER_NAME = "default"


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return everything of a model that trains: fp32 CPU copies, sorted by unsplit name."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in sorted(adapter_parameters(model))
    }


def set_trainable(model: nn.Module, names: Collection[str] | None) -> None:
    """Let only these tensors of the adapter require grad; None: all of them.

    Args:
        model: A model with an adapter attached.
        names: As :func:`adapter_state` names them; some aggregation methods freeze a factor.
    """
    for name, parameter in adapter_parameters(model):
        parameter.requires_grad_(names is None or name in names)


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an adapter into a model; names and shapes must be exactly the model's.

    Args:
        model: A model with an adapter attached.
        state: As :func:`adapter_state` returns it.

    Raises:
        SplitError: A name is missing or unexpected, or a shape differs.
    """
    own = dict(adapter_parameters(model))
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    problems = [
        f"{kind}: {some(names)}"
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
    """Return the scale of ΔW of every module with LoRA, by unsplit module name, sorted."""
    return {name: float(layer.scaling[ADAPTER_NAME]) for name, layer in sorted(lora_layers(model))}


def adapter_name(name: str) -> str:
    """Return the name that PEFT saves a parameter by, from the name in the model."""
    name = saved_name(name).replace(f".{ADAPTER_NAME}.", ".").removesuffix(f".{ADAPTER_NAME}")
    return name.removesuffix(".weight") if name.endswith(MAGNITUDE + ".weight") else name


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every module with LoRA, by its unsplit name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the factors of LoRA and the magnitudes of DoRA."""
    for module_name, layer in lora_layers(model):
        for name, parameter in cast(nn.Module, layer).named_parameters():
            if name.startswith("lora_") and f".{ADAPTER_NAME}" in name:
                yield adapter_name(f"{module_name}.{name}"), parameter


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return everything that trains, by the name that PEFT saves it by."""
    yield from lora_parameters(model)
    yield from base_weights(model)
