"""Clients with cut layers of their own, as the ServerApp sees them: who holds which modules.

The rule for layers that a client and the trunk both hold is in :mod:`flower_split.parties.parts`.
The global adapter has the modules of all clients together; each client is sent those that it holds,
and a module is averaged over its holders, by their weights among themselves.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from flower_split.aggregation.core.adapter_layout import layout_of
from flower_split.aggregation.core.client_updates import AdapterSpec
from flower_split.config import RunConfig
from flower_split.errors import FederationError
from flower_split.lora import attach_lora
from flower_split.lora.initial_values import Inits, initial_value
from flower_split.lora.state import adapter_parameters, lora_scales
from flower_split.parties.parts import held_modules, model_cuts, overlap_layers, trunk_parts
from flower_split.split import CutLayers
from flower_split.split.loading.model_source import ModelSource
from flower_split.split.loading.parts import empty_model
from flower_split.split.structure.stack import LayerStack, find_stack

logger = logging.getLogger(__name__)


def overlap_adapter(
    config: RunConfig, cuts: Iterable[CutLayers]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return what the clients' copies of trunk layers begin with, over all clients.

    Args:
        config: The run's configuration.
        cuts: The clients'.

    Returns:
        ``(adapter, scales)`` of the layers that at least one client holds beside the trunk, as
        :func:`flower_split.lora.initial_client_adapter` gives them; empty where the trunk does not
        train. The trunk's own adapter begins with the same values.
    """
    run, parts = model_cuts(config), trunk_parts(config)
    layers = {index for own in cuts for index in overlap_layers(run, own)}
    if not layers or config.mode != "joint":
        return {}, {}
    model = empty_model(ModelSource.of(config.model))
    attach_lora(model, run, parts, seed=config.seed)
    stack = find_stack(model)
    init_of = Inits(model, stack, run, parts)
    state = {
        name: initial_value(config.seed, name, parameter.shape, init_of(name))
        for name, parameter in adapter_parameters(model)
        if stack.index_of(name) in layers
    }
    scales = {n: scale for n, scale in lora_scales(model).items() if stack.index_of(n) in layers}
    return dict(sorted(state.items())), scales


def cut_specs(
    config: RunConfig,
    cuts: Mapping[int, CutLayers],
    adapter: Mapping[str, Tensor],
    specs: Mapping[int, AdapterSpec],
) -> dict[int, AdapterSpec]:
    """Return ``specs`` with the modules that each client holds.

    Args:
        config: The run's configuration.
        cuts: The clients' cut layers, by slot.
        adapter: The global adapter.
        specs: What else the clients have of their own, by slot.

    Returns:
        Every slot's, if one client has cut layers of its own; else ``specs``.

    Raises:
        FederationError: A client would have nothing to train.
    """
    run = model_cuts(config)
    if all(own == run for own in cuts.values()):
        return dict(specs)
    stack, modules = _stack(config), layout_of(adapter).modules
    found = {}
    for slot, own in sorted(cuts.items()):
        held = held_modules(modules, stack, run, own)
        if not held:
            raise FederationError(
                f"partition {slot} is cut at {own} and holds no module with LoRA: it would have "
                "nothing to train. Give it more layers, or lora.*.target-modules that it holds."
            )
        found[slot] = replace(specs.get(slot, AdapterSpec()), modules=held)
    return found


def check_resumed(former: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    """Refuse to go on with clients that hold other layers than before, all together.

    Args:
        former: The adapter that the run was left with.
        adapter: The one that it would begin with now.

    Raises:
        FederationError: They are not of the same tensors.
    """
    other = sorted(former.keys() ^ adapter.keys())
    if other:
        raise FederationError(
            "the run to go on with had clients that held other layers: its adapter differs in "
            f"{len(other)} tensors, such as {other[0]}. Start the SuperNodes with the cut layers "
            "(first-cut, second-cut) that they had, or begin a new run."
        )


def unused_layers(run: CutLayers, cuts: Iterable[CutLayers]) -> list[int]:
    """Return the trunk's layers that no client's calls run, ascending."""
    used = {index for own in cuts for index in range(own.first, own.second)}
    return [index for index in range(run.first, run.second) if index not in used]


def cut_notes(config: RunConfig, cuts: Mapping[int, CutLayers]) -> list[str]:
    """Return what a reader of the report must know about the clients' cut layers."""
    run = model_cuts(config)
    own = {slot: item for slot, item in sorted(cuts.items()) if item != run}
    if not own:
        return []
    listed = ", ".join(f"{slot} at {item}" for slot, item in own.items())
    notes = [
        f"Clients with cut layers of their own (the run's are {run}): partitions {listed}. They "
        "train copies of their own of the trunk layers that they hold, averaged among them; the "
        "trunk's copies train on the others' data. The exported adapter has the trunk's copies; "
        "flower-split export --cuts first:second gives the model that such a client computed."
    ]
    unused = unused_layers(run, cuts.values())
    if unused:
        notes.append(
            f"No client's calls run the trunk's layers {', '.join(map(str, unused))}: the trunk's "
            "copies of them do not train. Give the trunk a narrower span, or export with --cuts."
        )
    return notes


def _stack(config: RunConfig) -> LayerStack:
    return find_stack(empty_model(ModelSource.of(config.model)))
