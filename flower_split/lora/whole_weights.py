"""Weights of the base model that train whole: biases, modules to save, a part in full.

They are fp32 while they train, whatever the base's dtype: a bf16 weight would swallow most of a
small step, and most of a mean over clients. A module of another dtype computes with the weight cast
to its own.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flower_split.errors import ConfigError

_MASTER = re.compile(r"\.parametrizations\.([^.]+)\.original$")

ParameterSlot = tuple[nn.Module, str]  # a module, and the name of one of its own parameters


class BaseWeight(nn.Parameter):
    """A weight of the base model that trains whole, in fp32. Its type tells it from frozen ones."""


class _Cast(nn.Module):
    """An fp32 weight as its module computes with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def own_parameters(modules: Iterable[nn.Module]) -> list[ParameterSlot]:
    """Return the parameters that lie directly in ``modules``."""
    return [
        (module, key)
        for module in modules
        for key, value in module.named_parameters(recurse=False)
        if value is not None
    ]


def train_whole(model: nn.Module, slots: Iterable[ParameterSlot]) -> None:
    """Make the parameters at ``slots`` :class:`BaseWeight`.

    A weight that several modules share (tied embeddings) stays shared if all of them are in
    ``slots``; otherwise those that are get a copy of their own, as PEFT's ``modules_to_save`` does.

    Args:
        model: The model, for who shares a weight with whom.
        slots: Parameters, in any order; one may be there twice.

    Raises:
        ConfigError: A weight is quantised, so it cannot train.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if value is not None:
                holders[id(value)] = holders.get(id(value), 0) + 1
    groups: dict[int, dict[tuple[int, str], ParameterSlot]] = {}
    for module, key in slots:
        group = groups.setdefault(id(module._parameters[key]), {})
        group[id(module), key] = (module, key)
    for identity, group in groups.items():
        _replace(list(group.values()), shared_beyond=holders[identity] > len(group))


def _replace(slots: list[ParameterSlot], *, shared_beyond: bool) -> None:
    module, key = slots[0]
    weight = module._parameters[key]
    assert weight is not None
    if type(weight) not in (nn.Parameter, BaseWeight) or not weight.is_floating_point():
        raise ConfigError(
            f"the {key} of a {type(module).__name__} is quantised ({weight.dtype}), so it cannot "
            'train whole. Leave it out of lora.*.modules-to-save, bias and train = "full".'
        )
    value = weight.detach().to(torch.float32)
    if shared_beyond and value.data_ptr() == weight.data_ptr() and not value.is_meta:
        value = value.clone()
    trained = BaseWeight(value)
    for module, key in slots:
        setattr(module, key, trained)
        if weight.dtype != torch.float32:
            parametrize.register_parametrization(module, key, _Cast(weight.dtype), unsafe=True)


def base_weights(model: nn.Module) -> Iterator[tuple[str, BaseWeight]]:
    """Return every :class:`BaseWeight`, by the name that PEFT saves it by."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, BaseWeight):
            yield saved_name(name), parameter


def saved_name(name: str) -> str:
    """Return the name of a parameter without the cast around it."""
    return _MASTER.sub(r".\1", name)
