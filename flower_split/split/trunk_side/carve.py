"""Keep only the trunk's weights in a model: what stands in place of everything else."""

import torch
from torch import nn

from flower_split.split.structure.cuts import CutLayers
from flower_split.split.structure.host_call import LayerOutput, StandIn
from flower_split.split.structure.place_holders import Absent, AbsentEmbedding, replace_in_place
from flower_split.split.structure.stack import LayerStack


def carve_trunk(
    root: nn.Module,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
) -> None:
    """Leave the trunk's weights alone in ``root``, in place.

    Args:
        root: The whole model.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs that the stand-ins share.
        constants: The embeddings that stay (:func:`constant_embeddings`).
    """
    replace_in_place(root, trunk_replacements(root, stack, cuts, output, constants))
    drop_outer_weights(root, stack)


def drop_outer_weights(root: nn.Module, stack: LayerStack) -> None:
    """Let nothing outside the layers be a parameter.

    Weights that lie directly in the modules around the layers become zeros, for what is computed
    with them before the first trunk layer does not matter; constant embeddings become buffers.
    """
    parts = stack.path.split(".")[:-1]
    for depth in range(len(parts) + 1):
        module = root.get_submodule(".".join(parts[:depth]))
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, torch.zeros_like(parameter.data), persistent=False)
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.Embedding) and stack.index_of(name) is None:
            weight = module.weight.data
            del module.weight
            module.register_buffer("weight", weight)


def constant_embeddings(fresh: nn.Module) -> frozenset[str]:
    """Return the embeddings that a family never trains, such as tables of sinusoids, by name.

    The layers may be given what is looked up in them, so the trunk keeps them.

    Args:
        fresh: A model as its class makes it, on any device.
    """
    return frozenset(
        name
        for name, module in fresh.named_modules()
        if isinstance(module, nn.Embedding) and not module.weight.requires_grad
    )


def trunk_replacements(
    root: nn.Module,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
) -> dict[str, nn.Module]:
    """Return what to put where, so that ``root`` keeps the trunk's weights alone.

    Layers outside the trunk become stand-ins; modules outside the stack that have parameters, and
    dropout (which would draw random numbers for nothing), become absent.

    Args:
        root: The whole model.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs that the stand-ins share.
        constants: The embeddings that stay (:func:`constant_embeddings`).

    Returns:
        Dotted name in ``root`` -> replacement.
    """
    replacements: dict[str, nn.Module] = {}
    for index, layer in enumerate(stack.layers(root)):
        if cuts.part_of(index) != "trunk":
            replacements[stack.layer_path(index)] = StandIn(layer, output)

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if child_path == stack.path:
                continue
            if stack.path.startswith(child_path + "."):
                walk(child, child_path)
            elif isinstance(child, nn.Embedding):
                if child_path not in constants:
                    replacements[child_path] = AbsentEmbedding(child)
            elif isinstance(child, nn.Dropout) or any(True for _ in child.parameters()):
                replacements[child_path] = Absent(child)

    walk(root, "")
    return replacements
