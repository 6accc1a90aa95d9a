"""Which module belongs to which part of a model."""

from collections.abc import Iterable

from torch import nn

from flower_split.split import CutLayers
from flower_split.split.structure.stack import LayerStack, find_stack

PARTS = ("bottom", "trunk", "top")


def stack_of(model: nn.Module) -> LayerStack:
    """Find the layers of an unsplit model, a client model or a trunk."""
    stack = getattr(model, "stack", None)
    return stack if isinstance(stack, LayerStack) else find_stack(model)


def part_of(name: str, stack: LayerStack, cuts: CutLayers, embeddings: frozenset[str]) -> str:
    """Return the part that owns module ``name``.

    Outside the stack of layers, embeddings are the bottom's and everything else is the top's.
    """
    index = stack.index_of(name)
    if index is not None:
        return cuts.part_of(index)
    return "bottom" if name in embeddings else "top"


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Return the names of a model's embeddings."""
    return frozenset(n for n, module in model.named_modules() if isinstance(module, nn.Embedding))


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that turns hidden states into logits, if the model has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Return whether module ``name`` is one of ``suffixes``, or ends with one after a dot."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether ``name`` is one of ``modules`` or within one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def some(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
