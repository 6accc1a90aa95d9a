"""A trunk's layers divided over several processes, as transformers' tensor parallelism does it.

Every process loads its share of each linear layer: some of the outputs of those that begin a block, some
of the inputs of those that end it (Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language
Models Using Model Parallelism", 2019). Which are which is the family's own plan; PEFT divides LoRA alike.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.structure.quantization import quantization_of
from flower_split.split.structure.stack import LayerStack

_NEEDED = {"torch": "2.8", "transformers": "5.17", "peft": "0.21"}  # that divide LoRA as weights
# Ways to divide a module that go with LoRA beside it.
_STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")
_LOCAL_RANK = "LOCAL_RANK"  # how transformers is told the index of a process's device


def check_parallel(
    name: str, skeleton: PreTrainedModel, stack: LayerStack, size: int, *, quantised: bool
) -> None:
    """Check that the layers of a model can be divided over ``size`` processes.

    Args:
        name: The model's, for messages.
        skeleton: The model without weights.
        stack: Where its layers are.
        size: Processes.
        quantised: Whether the weights are to be quantised as they are read.

    Raises:
        SplitError: The family has no plan, or another one than fits LoRA; the heads cannot be divided; the
            weights are quantised; or a library is too old.
    """
    for library, needed in _NEEDED.items():
        if Version(version(library)) < Version(needed):
            raise SplitError(
                f"trunk.tensor-parallel = {size} needs {library} {needed}; {version(library)} is "
                "installed. Upgrade it, or set trunk.tensor-parallel = 1."
            )
    if quantised or quantization_of(skeleton.config) is not None:
        raise SplitError(
            f"{name!r} is quantised, and trunk.tensor-parallel = {size} divides weights as they are. "
            'Use the checkpoint that it was made of with model.quantization = "", or set '
            "trunk.tensor-parallel = 1."
        )
    plan = layer_plan(skeleton, stack)
    others = sorted({style for style in plan.values() if style not in _STYLES})
    if not plan or others:
        why = f"divides some by {others[0]!r}" if others else "has no plan for it"
        raise SplitError(
            f"the layers of {name!r} cannot be divided over {size} processes together with LoRA: "
            f"transformers {why}. Set trunk.tensor-parallel = 1; trunk.device-map places whole layers."
        )
    config: Any = skeleton.config.get_text_config(decoder=True)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, key, None)
        if isinstance(count, int) and count % size:
            raise SplitError(
                f"trunk.tensor-parallel = {size} divides {key} of {name!r}, which is {count}. Use a "
                "divisor of it."
            )


def layer_plan(model: PreTrainedModel, stack: LayerStack) -> dict[str, str]:
    """Return how transformers divides a model's layers: module name, ``*`` for the layer -> style."""
    begin = f"{stack.path}.*."
    return {name: style for name, style in (model.tp_plan or {}).items() if name.startswith(begin)}


@contextlib.contextmanager
def loading_share(size: int, device: torch.device | str | None) -> Iterator[dict[str, Any]]:
    """Return what ``from_pretrained`` takes inside the block to load this process's share of ``size``.

    Args:
        size: Processes.
        device: This process's; transformers is told its index by the environment.
    """
    # Not there in earlier versions.
    from transformers.distributed.configuration_utils import DistributedConfig

    before = os.environ.get(_LOCAL_RANK)
    os.environ[_LOCAL_RANK] = str(torch.device(device or "cpu").index or 0)
    try:
        yield {"distributed_config": DistributedConfig(tp_size=size)}
    finally:
        if before is None:
            del os.environ[_LOCAL_RANK]
        else:
            os.environ[_LOCAL_RANK] = before


def note_for_lora(model: PreTrainedModel, stack: LayerStack) -> None:
    """Tell PEFT which linear layers are divided, and how: it looks at each of them."""
    plan = layer_plan(model, stack)
    for name, module in model.named_modules():
        index = stack.index_of(name)
        style = None if index is None else plan.get(_any_layer(name, stack, index))
        mesh = _mesh_of(module) if style else None
        if mesh is not None:
            vars(module).update(_hf_tp_plan=style, _hf_device_mesh=mesh)


def _any_layer(name: str, stack: LayerStack, index: int) -> str:
    return f"{stack.path}.*.{name.removeprefix(stack.layer_path(index) + '.')}"


def _mesh_of(module: nn.Module) -> object:
    parameters: Mapping[str, object] = module._parameters
    return getattr(parameters.get("weight"), "device_mesh", None)
