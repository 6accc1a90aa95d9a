"""An adapter aggregator's state as named tensors, for a checkpoint.

Names are ``other::<tensor>``, ``lora::<module>::<key of the method's state>`` and
``base::<module>::A`` / ``B``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.aggregation.core.adapter_layout import Layout, check_names
from flower_split.aggregation.core.client_updates import named
from flower_split.aggregation.core.factors import Factors, State
from flower_split.aggregation.core.method import Aggregator

SEPARATOR = "::"


@dataclass(frozen=True, slots=True)
class AggregatorState:
    """Everything that an adapter aggregator carries from round to round.

    Args:
        modules: Module name → its method's state.
        others: Name → value of the tensors that are no LoRA factor.
        base: Module name → the base change so far, of the modules that have one.
    """

    modules: Mapping[str, State]
    others: Mapping[str, Tensor]
    base: Mapping[str, Factors]


def state_dict(method: Aggregator, state: AggregatorState) -> dict[str, Tensor]:
    """Return the state as named tensors on the CPU that share no memory, sorted."""
    tensors = {f"other{SEPARATOR}{name}": value for name, value in state.others.items()}
    for module, one in state.modules.items():
        for key, value in method.state_dict(one).items():
            tensors[SEPARATOR.join(("lora", module, key))] = value
    for module, base in state.base.items():
        tensors[SEPARATOR.join(("base", module, "A"))] = base.A
        tensors[SEPARATOR.join(("base", module, "B"))] = base.B
    return {
        name: tensors[name].to("cpu").clone(memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }


def load_state_dict(
    method: Aggregator, tensors: Mapping[str, Tensor], layout: Layout, device: torch.device
) -> AggregatorState:
    """Return the state that :func:`state_dict` wrote, bit for bit.

    Args:
        method: The method that wrote it.
        tensors: The checkpoint.
        layout: Of the adapter; its modules and other tensors are what is read.
        device: Where the states of the modules are put.

    Raises:
        AggregationError: The checkpoint lacks something.
    """
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(SEPARATOR)
        owner, _, key = rest.partition(SEPARATOR)
        groups.setdefault((kind, owner), {})[key] = value
    modules: dict[str, State] = {}
    bases: dict[str, Factors] = {}
    for module in layout.modules:
        stored = groups.get(("lora", module), {})
        with named(module):
            modules[module] = method.load_state_dict(
                {key: value.to(device) for key, value in stored.items()}
            )
        if ("base", module) in groups:
            base = groups["base", module]
            bases[module] = Factors(base["A"], base["B"]).to(device)
    others = {owner: group[""] for (kind, owner), group in groups.items() if kind == "other"}
    check_names(others, layout.others, "the checkpoint")
    return AggregatorState(modules, {name: others[name].clone() for name in layout.others}, bases)
