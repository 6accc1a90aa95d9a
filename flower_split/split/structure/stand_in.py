"""Modules that stand where another party's modules are, so that indices and names never change.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import contextlib
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flower_split.errors import SplitError
from flower_split.split.structure.kv_cache import enter_place_holder, find_cache
from flower_split.split.structure.layer_arguments import tensors_of

# nn.Module's own bookkeeping; what would make a stand-in take part in checkpointing; and what
# accelerate puts on a layer that it moves inputs for, whose forward would be the layer's.
_NOT_COPIED = frozenset(nn.Module().__dict__) | {
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "forward",
    "_hf_hook",
    "_old_forward",
}


class LayerOutput:
    """What a family's layers return: the hidden states alone, or first in a tuple.

    Args:
        length: Number of entries of the tuple; None if a layer returns a bare tensor.

    Attributes:
        handed_on: Entry of the tuple -> place of the argument that a layer hands on to the next
            one in it, such as a position bias that the first layer makes for all.
    """

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self.handed_on: dict[int, str] = {}

    def learn(self, output: object) -> None:
        """Take the form of a real layer's output."""
        self.length = len(output) if isinstance(output, (tuple, list)) else None

    def learn_handed_on(self, output: object, following: Mapping[str, Tensor]) -> None:
        """See which entries of a real layer's output the layer after it is given.

        Args:
            output: What the layer returned.
            following: The tensors among the next layer's arguments, by place.
        """
        if isinstance(output, (tuple, list)):
            for entry, value in enumerate(output[1:], start=1):
                for place, tensor in following.items():
                    if tensor is value:
                        self.handed_on[entry] = place

    def wrap(
        self, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Return ``hidden_states`` in the family's form; other entries are handed on, or None.

        Args:
            hidden_states: To be returned.
            args: Positional arguments of the layer's call.
            kwargs: Named arguments of the layer's call.
        """
        if self.length is None:
            return hidden_states
        given = tensors_of(args, kwargs) if self.handed_on else {}
        others = (self.handed_on.get(entry, "") for entry in range(1, self.length))
        return (hidden_states, *[given.get(place) for place in others])


def hidden_states_of(output: object) -> Tensor:
    """Return the hidden states in a layer's output.

    Raises:
        SplitError: The output is neither a tensor nor a tuple that begins with one.
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise SplitError(
            f"a layer returned {type(output).__name__} where a tensor of hidden states, or a "
            "tuple that begins with one, was expected. This family cannot be cut between layers."
        )
    return first


def take_hidden_states(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """Return the hidden states among the arguments of a layer's call: the first, or by name."""
    return hidden_states_of(args[0] if args else kwargs.get("hidden_states"))


class StandIn(nn.Module):
    """Stands where another party's layer is, and passes the hidden states through.

    It keeps the plain attributes of the layer and of its submodules (``attention_type`` and the
    like), because a model's forward may read them. It has no parameters and no submodules.

    Args:
        layer: The layer that it replaces; nothing of its weights is kept.
        output: The form of the family's layer outputs, shared by all stand-ins of a model.
        index: The layer's index in the model, if it is to enter positions into key-value caches.
    """

    def __init__(self, layer: nn.Module, output: LayerOutput, index: int | None = None) -> None:
        super().__init__()
        self._layer_class: type[nn.Module] = type(layer)
        self._copied = dict(vars(_attributes(layer)))
        if isinstance(layer, StandIn):  # of a layer that is replaced already
            self._layer_class, self._copied = layer._layer_class, layer._copied
        self.__dict__.update(self._copied)
        self._layer_output = output
        self._layer_index = index

    def __getattr__(self, name: str) -> Any:
        """Return a class attribute of the replaced layer; methods are not carried over."""
        with contextlib.suppress(AttributeError):
            return super().__getattr__(name)
        value = getattr(self.__dict__.get("_layer_class", object), name)
        if name == "gradient_checkpointing" or callable(value):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the first argument, in the form of the family's layer outputs."""
        hidden_states = take_hidden_states(args, kwargs)
        # With autograd no call goes on with a cache, so there is nothing to keep count of.
        counting = self._layer_index is not None and not torch.is_grad_enabled()
        cache = find_cache(args, kwargs) if counting else None
        if cache is not None and self._layer_index is not None:
            enter_place_holder(cache, self._layer_index, hidden_states)
        return self._layer_output.wrap(hidden_states, args, kwargs)


def _attributes(module: nn.Module, *, weights: bool = False) -> SimpleNamespace:
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
    """Copy as :func:`_attributes` does; a dict or list of modules stays one, with its keys or length."""
    if isinstance(module, nn.ModuleDict):
        return {name: _collected(child, weights) for name, child in module.items()}
    if isinstance(module, nn.ModuleList):
        return [_collected(child, weights) for child in module]
    return _attributes(module, weights=weights)


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
        self.__dict__.update(vars(_attributes(module, weights=True)))

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


# What holds the place of another party's module.
PLACE_HOLDERS = (StandIn, Absent, AbsentEmbedding)


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
