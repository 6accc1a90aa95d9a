"""This process's share of a trunk whose layers several processes divide, and its calls.

The trainable weights exist whole at the leader. A process computes with its share of them, made anew
whenever they have changed, so that a call that came before keeps the weights that it was made with.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flower_split.split import TrunkModel
from flower_split.split.structure.stack import address_of
from flower_split.split.trunk_side.model import TrunkInputs
from flower_split.trunk.compute.checks import HIDDEN
from flower_split.trunk.compute.weight_versions import ParameterSlots, Weights


@dataclass(eq=False, slots=True, weakref_slot=True)
class LocalCall:
    """One call as this process has computed it; the output is the same in all of them."""

    leaf: Tensor
    output: Tensor
    parameters: tuple[nn.Parameter, ...]  # this process's shares

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of the hidden states, and of this process's shares, as local tensors."""
        smashed_grad, *found = torch.autograd.grad(
            self.output,
            [self.leaf, *self.parameters],
            grad.to(self.output.device, self.output.dtype),
            allow_unused=True,
        )
        pairs = zip(found, self.parameters, strict=True)
        return smashed_grad, [None if g is None else _local(g, p) for g, p in pairs]


class Shards:
    """The share of one process.

    Args:
        trunk: With divided layers and its adapter attached.

    Attributes:
        trunk: The same; every process of the group calls it at once.
        names: Of what trains, sorted.
        divided: Which of them are divided: the dimension, or None.
        storages: Addresses of the memory of all weights, as they are now.
    """

    def __init__(self, trunk: TrunkModel) -> None:
        self.trunk = trunk
        own = sorted((name, p) for name, p in trunk.named_parameters() if p.requires_grad)
        self.names = [name for name, _ in own]
        parameters = tuple(parameter for _, parameter in own)
        self.divided = [_dimension(parameter) for parameter in parameters]
        self._slots = ParameterSlots(trunk, parameters)
        self._weights = Weights(0, parameters)
        frozen = [p for p in trunk.parameters() if not p.requires_grad]
        self._frozen = {address_of(parameter) for parameter in frozen}
        self.storages = self._frozen | {address_of(parameter) for parameter in parameters}

    @property
    def device(self) -> torch.device:
        """Return this process's."""
        return next(self.trunk.parameters()).device

    def whole(self) -> list[Tensor]:
        """Return the trainable weights, whole; every process of the group asks at once."""
        return [_whole(parameter.detach()).clone() for parameter in self._weights.parameters]

    def take(self, whole: Sequence[Tensor]) -> None:
        """Compute with these weights from now on.

        Args:
            whole: By :attr:`names`; they are copied.
        """
        pairs = zip(self._weights.parameters, whole, strict=True)
        fresh = tuple(nn.Parameter(_share(like, value.detach().clone())) for like, value in pairs)
        self._weights = Weights(self._weights.version + 1, fresh)
        self.storages.clear()
        self.storages |= self._frozen | {address_of(parameter) for parameter in fresh}

    def call(
        self, inputs: Mapping[str, Tensor], use_cache: bool | None, *, training: bool, graph: bool
    ) -> LocalCall:
        """Compute a call's forward.

        Args:
            inputs: ``hidden_states``, and the names of ``TrunkInputs``.
            use_cache: As the model's own argument.
            training: Whether dropout is on.
            graph: Whether the backward may come.
        """
        others = {name: tensor for name, tensor in inputs.items() if name != HIDDEN}
        given = TrunkInputs.of(others, self.device)
        leaf = inputs[HIDDEN].detach().requires_grad_(graph)
        if self.trunk.training != training:
            self.trunk.train(training)
        with torch.set_grad_enabled(graph), self._slots.holding(self._weights):
            output = self.trunk(
                leaf,
                attention_mask=given.attention_mask,
                position_ids=given.position_ids,
                use_cache=use_cache,
                layer_arguments=given.layer_arguments,
                host_arguments=given.host_arguments,
            )
        return LocalCall(leaf, output, self._weights.parameters)

    def joined(self, shares: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Return whole gradients.

        Args:
            shares: Of each process by rank, the gradients by :attr:`names`; what is not divided is
                complete everywhere, and of the first.
        """
        found: list[Tensor | None] = []
        for index, dimension in enumerate(self.divided):
            parts = [one[index] for one in shares]
            there = [part for part in parts if part is not None]
            if dimension is None or not there:
                found.append(parts[0])
            else:
                found.append(torch.cat([part.to(there[0].device) for part in there], dimension))
        return found


def _dimension(parameter: Tensor) -> int | None:
    """Return the dimension that is divided; None: every process has the whole parameter."""
    if not isinstance(parameter, DTensor):
        return None
    (placement,) = parameter.placements
    dimension: int = placement.dim % parameter.ndim  # type: ignore[attr-defined]
    return dimension


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole; every process of the group asks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(like: Tensor, whole: Tensor) -> Tensor:
    """Return this process's share of ``whole``, divided as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _local(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient of this process's share."""
    if not isinstance(gradient, DTensor):
        return gradient
    placements = parameter.placements if isinstance(parameter, DTensor) else None
    if placements is None:
        return _whole(gradient)
    if gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
    return gradient.to_local()
