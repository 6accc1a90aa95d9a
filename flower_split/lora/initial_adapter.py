"""The clients' adapter as a run begins, made without reading base weights."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flower_split.config import LoraPartConfig
from flower_split.errors import SplitError
from flower_split.lora.attach import attach_lora
from flower_split.lora.initial_values import Inits, initial_value, is_base_value
from flower_split.lora.model_parts import some, stack_of
from flower_split.lora.state import adapter_parameters, lora_scales
from flower_split.split import CutLayers
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import empty_model

FetchBaseValues = Callable[[Mapping[str, torch.Size]], Mapping[str, Tensor]]
"""Given names and shapes of base values, the values, fp32 on the CPU."""


def initial_client_adapter(
    source: ModelSource | str,
    cuts: CutLayers,
    parts: Mapping[str, LoraPartConfig],
    *,
    seed: int,
    fetch: FetchBaseValues | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a client's adapter as it begins, without reading base weights.

    Args:
        source: The base model, or its local directory or hub id; only its configuration is read. Its
            dtype changes nothing, for an adapter is fp32; its attention implementation may decide
            which modules there are.
        cuts: The cut layers.
        parts: As for :func:`attach_lora`; a client's parts are ``bottom`` and ``top``.
        seed: As for :func:`attach_lora`.
        fetch: Called once if there are base values; None: they are left out.

    Returns:
        What :func:`adapter_state` and :func:`lora_scales` would return for a client.

    Raises:
        SplitError: The cuts do not fit the model, or ``fetch`` gave tensors of other names or shapes.
        ConfigError: As for :func:`attach_lora`.
    """
    model = empty_model(source, cuts)
    attach_lora(model, cuts, parts, seed=seed)
    init_of = Inits(model, stack_of(model), cuts, parts)
    shapes = {name: parameter.shape for name, parameter in adapter_parameters(model)}
    wanted = {name: shape for name, shape in shapes.items() if is_base_value(name)}
    state = {
        name: initial_value(seed, name, shape, init_of(name))
        for name, shape in shapes.items()
        if name not in wanted
    }
    if wanted and fetch is not None:
        state.update(_checked(fetch(wanted), wanted))
    return dict(sorted(state.items())), lora_scales(model)


def _checked(
    values: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> Mapping[str, Tensor]:
    wrong = sorted(
        name
        for name in values.keys() | shapes.keys()
        if name not in values or name not in shapes or values[name].shape != shapes[name]
    )
    if wrong:
        raise SplitError(
            f"the initial values of {some(wrong)} are missing, or are not of the shape that the "
            "model's configuration says. Use the same model files on every machine."
        )
    return values
