"""CUDA graphs of decoder layers: one launch for a layer's forward, and one for its backward.

A layer of a few hundred positions is bound by its launches, and where several processes share a GPU each
launch may wait for the others' turns. Layers are captured one by one, by
:func:`torch.cuda.make_graphed_callables`; the kernels are those of the layer's own forward.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Forward = Callable[..., object]
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Forward]

MAX_POSITIONS = 1024  # rows times positions; longer passes are bound by arithmetic
MAX_GRAPHS = 4  # of one layer: each keeps memory of its own
_MAX_SEEN = 256  # kinds of calls that a layer remembers to have had once

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class GraphedForward:
    """A layer's forward that replays a CUDA graph where a training call is small and repeats.

    What is returned, and every gradient, lies in memory that the next replay overwrites. So a forward's
    backward must end before the next forward begins, and gradients that are summed over several calls
    must be copied. Calls that are not of the kind run the layer's own forward: without autograd or in
    evaluation, above ``MAX_POSITIONS``, with arguments other than tensors and plain values, with hooks
    inside the layer, or with weights that have moved.

    Args:
        layer: On one GPU.
        forward: Its forward, compiled or not; takes the hidden states first.
        capture: Makes a module's calls replays, given tensors like those it will be called with.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Forward,
        capture: Capture = torch.cuda.make_graphed_callables,
    ) -> None:
        functools.update_wrapper(self, forward)  # transformers reads the signature
        self._layer, self._forward, self._capture = layer, forward, capture
        self._graphs: dict[Hashable, Forward] = {}
        self._seen: set[Hashable] = set()

    @property
    def num_graphs(self) -> int:
        """Return how many kinds of calls have been captured."""
        return len(self._graphs)

    def __call__(self, *args: object, **named: object) -> object:
        """Return the layer's output."""
        tensors: list[Tensor] = []
        kind = self._kind(args, named, tensors)
        if kind is None:
            return self._forward(*args, **named)
        graph = self._graphs.get(kind)
        if graph is None and kind in self._seen and len(self._graphs) < MAX_GRAPHS:
            graph = self._graphs[kind] = self._captured(args, named, tensors)
        if graph is not None:
            return graph(*tensors)
        output = self._forward(*args, **named)
        if isinstance(output, Tensor):  # a graph returns nothing else
            if len(self._seen) == _MAX_SEEN:
                self._seen.clear()
            self._seen.add(kind)
        return output

    def _kind(
        self, args: tuple[object, ...], named: dict[str, object], tensors: list[Tensor]
    ) -> Hashable | None:
        """Return what calls of one graph have in common; None: this one may have no graph.

        Args:
            args: Of the call.
            named: Of the call.
            tensors: The call's tensors are added here, in order.
        """
        if not (torch.is_grad_enabled() and self._layer.training):
            return None
        try:
            form = _form_of((args, named), tensors)
        except TypeError:
            return None
        if not tensors or tensors[0].numel() > MAX_POSITIONS * tensors[0].shape[-1]:
            return None
        weights = _weights_of(self._layer)
        return None if weights is None else (form, weights)

    def _captured(
        self, args: tuple[object, ...], named: dict[str, object], tensors: Sequence[Tensor]
    ) -> Forward:
        """Return a graph for calls like this one; the random state stays as it is."""
        like = tuple(
            tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors
        )
        call = _Call(self._layer, self._forward, args, named, like)
        device = tensors[0].device
        try:
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.autocast(
                    device.type,
                    dtype=torch.get_autocast_dtype(device.type),
                    enabled=torch.is_autocast_enabled(device.type),
                    cache_enabled=False,
                ),
            ):
                return self._capture(call, like)
        except RuntimeError as error:
            logger.warning(
                "a layer of shape %s runs without a CUDA graph, which is slower: %s",
                tuple(tensors[0].shape),
                error,
            )
            return call


class _Call(nn.Module):
    """A layer's call as a function of its tensors alone, for :class:`GraphedForward`.

    Args:
        layer: Its parameters are inputs of the graph.
        forward: Its forward.
        args: Of a call.
        named: Of the same call.
        tensors: What stands for the call's tensors.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Forward,
        args: tuple[object, ...],
        named: dict[str, object],
        tensors: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.layer = layer
        self._run = forward
        self._args, self._named = _filled((args, named), iter(tensors))

    def forward(self, *tensors: Tensor) -> object:
        """Run the layer on ``tensors``, in the order of the call's."""
        args, named = _filled((self._args, self._named), iter(tensors))
        return self._run(*args, **named)


def _form_of(value: object, tensors: list[Tensor]) -> Hashable:
    """Return what ``value`` is but for its tensors' content, and add those to ``tensors``.

    Raises:
        TypeError: Something in it is neither a tensor nor plain.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return (type(value), *[_form_of(item, tensors) for item in value])
    if isinstance(value, dict):
        return (dict, *[(name, _form_of(item, tensors)) for name, item in value.items()])
    if isinstance(value, _PLAIN):
        return (type(value), value)
    raise TypeError(f"{type(value).__name__} is no input of a graph")


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a copy of ``value`` with the next of ``tensors`` wherever it has one."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return type(value)([_filled(item, tensors) for item in value])
    if isinstance(value, dict):
        return {name: _filled(item, tensors) for name, item in value.items()}
    return value


def _weights_of(layer: nn.Module) -> Hashable | None:
    """Return where a layer's weights lie and which train; None: a graph would not see all it does."""
    weights: list[tuple[int, bool]] = []
    for module in layer.modules():
        if module is not layer and (module._forward_hooks or module._forward_pre_hooks):
            return None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if not tensor.is_floating_point():  # quantised: its kernels are others' code
                return None
            weights.append((tensor.data_ptr(), tensor.requires_grad))
    return tuple(weights)
