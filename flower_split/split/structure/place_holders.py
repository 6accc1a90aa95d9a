"""Modules that hold the place of another party's modules, so that indices and names never change.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

# nn.Module's own bookkeeping; what would make a stand-in take part in checkpointing; and what
# accelerate puts on a layer that it moves inputs for, whose forward would be the layer's.
_NOT_COPIED = frozenset(nn.Module().__dict__) | {
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "forward",
    "_hf_hook",
    "_old_forward",
}


def replace_in_place(root: nn.Module, replacements: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in place of others.

    Returns:
        The modules that were there; given back to this function, they restore ``root``.
    """
    replaced = {}
    for path, module in replacements.items():
        parent_path, _, name = path.rpartition(".")
        replaced[path] = root.get_submodule(path)
        setattr(root.get_submodule(parent_path), name, module)
    return replaced


def plain_attributes(module: nn.Module, *, weights: bool = False) -> SimpleNamespace:
    """Return the plain attributes of a module and, nested, of its submodules: no tensors, no modules.

    With ``weights`` there are also the parameters, on the meta device.
    """
    values: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if name not in _NOT_COPIED and not _holds_tensors(value)
    }
    if weights:
        for name, parameter in module.named_parameters(recurse=False):
            values[name] = torch.empty_like(parameter, device="meta", requires_grad=False)
    for name, child in module.named_children():
        values[name] = _collected(child, weights)
    return SimpleNamespace(**values)


def _collected(module: nn.Module, weights: bool) -> object:
    """Copy as :func:`plain_attributes`; a dict or list of modules stays one, with its keys or length."""
    if isinstance(module, nn.ModuleDict):
        return {name: _collected(child, weights) for name, child in module.items()}
    if isinstance(module, nn.ModuleList):
        return [_collected(child, weights) for child in module]
    return plain_attributes(module, weights=weights)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor)):
        return any(isinstance(item, (Tensor, nn.Module)) for item in value)
    return isinstance(value, (Tensor, nn.Module))


class Absent(nn.Module):
    """Stands in the trunk where a module of the bottom or top is; passes its input through.

    A forward that asks for the dtype of a weight inside it finds one without data.

    Args:
        module: The module that it replaces.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(vars(plain_attributes(module, weights=True)))

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first argument that may be hidden states; the trunk ignores what is made of it."""
        values = [*args, *kwargs.values()]
        floating = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        for value in (*(v for v in floating if v.dim() > 2), *floating, *values):
            return value
        return None


class AbsentEmbedding(nn.Module):
    """Stands in the trunk where an embedding is; returns zeros that take no memory.

    Args:
        embedding: The embedding that it replaces.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding_dim = embedding.embedding_dim
        self.num_embeddings = embedding.num_embeddings
        self.padding_idx = embedding.padding_idx
        zero = torch.zeros((), dtype=embedding.weight.dtype, device=embedding.weight.device)
        self.register_buffer("zero", zero, persistent=False)
        self.zero: Tensor

    @property
    def weight(self) -> Tensor:
        """Zeros ``[number of embeddings, dimension]``, for forwards that use the table itself."""
        return self.zero.expand(self.num_embeddings, self.embedding_dim)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return zeros of the shape of the first tensor argument, plus the embedding dimension.

        Where that is hidden states, as for some position embeddings, their last dimension does
        not count.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                shape = value.shape[:2] if value.is_floating_point() else value.shape
                return self.zero.expand(*shape, self.embedding_dim)
        return self.zero.expand(1, self.embedding_dim)
