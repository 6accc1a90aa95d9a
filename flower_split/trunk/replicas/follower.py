"""A follower: it computes the leader's orders on its own device, with its own copy of the trunk's layers.

It decides nothing: which slots are its own, what stays in memory and what the weights are comes from the
leader. Weights are the leader's bits; there is no optimizer here.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.compute.joining import Part
from flower_split.trunk.compute.joint import Joint
from flower_split.trunk.compute.joint_pass import Given, JointPass, PassGradient
from flower_split.trunk.replicas.group import LEADER, ReplicaGroup
from flower_split.trunk.replicas.orders import (
    AgainOrder,
    BackwardOrder,
    Backwards,
    BatchOrder,
    Broken,
    Failure,
    ForwardOrder,
    Forwards,
    GradientHeader,
    Kept,
    PassHeader,
    Reply,
)
from flower_split.trunk.replicas.packing import Layout, length_of, pack, unpack

logger = logging.getLogger(__name__)


class Follower:
    """Answers orders, one after the other.

    Args:
        compute: The trunk module; its optimizer is never used.
        joint: Joint passes of it.
        group: Where the orders' tensors come from.
        graph_bytes: What the graphs of its passes may take together.
    """

    def __init__(
        self, compute: TrunkCompute, joint: Joint, group: ReplicaGroup, graph_bytes: int
    ) -> None:
        self._compute = compute
        self._joint = joint
        self._group = group
        self._graph_bytes = graph_bytes
        self._passes: dict[int, JointPass] = {}
        self._next = 0

    @property
    def num_passes(self) -> int:
        """Return how many passes it keeps for the leader."""
        return len(self._passes)

    def answer(self, order: BatchOrder) -> tuple[Reply, Tensor | None]:
        """Carry an order out; return the reply, and the bytes that follow it.

        An order's tensors are received first, whatever becomes of it, so that both ends stay in step.
        """
        tensors: list[Tensor] = []
        if not isinstance(order, AgainOrder):
            tensors = self._received(order.layout)
        try:
            self._forget(order.kept)
            if isinstance(order, ForwardOrder):
                return self._forward(order, tensors)
            if isinstance(order, BackwardOrder):
                return self._backward(order, tensors)
            return self._again(order)
        except Exception as error:
            logger.exception("an order failed")
            return Broken(f"{type(error).__name__}: {error}"), None

    def send(self, buffer: Tensor) -> None:
        """Send the leader the bytes that follow a reply."""
        self._group.send(buffer, LEADER)

    def _received(self, layout: Layout) -> list[Tensor]:
        return unpack(layout, self._group.receive(length_of(layout), LEADER))

    def _forget(self, kept: Kept) -> None:
        self._passes = {n: one for n, one in self._passes.items() if n in kept.alive}
        for number in kept.without_graph & self._passes.keys():
            _drop_graph(self._passes[number])

    def _forward(self, order: ForwardOrder, tensors: list[Tensor]) -> tuple[Reply, Tensor]:
        given = iter(tensors)
        if order.weights:
            self._load(given, order.version)
        parts = [
            Part(
                slot=header.slot,
                tensors={name: next(given) for name in header.names},
                use_cache=header.use_cache,
                cuts=header.cuts,
            )
            for header in order.parts
        ]
        first = self._next
        made = self._joint.forward(parts, order.seed_of, self._keep)
        headers = tuple(_header(number, one) for number, one in enumerate(made.passes, first))
        slots = tuple(sorted(made.outputs))
        layout, buffer = pack([made.outputs[slot] for slot in slots], self._group.device)
        failures = {slot: Failure.of(error) for slot, error in made.failures.items()}
        return Forwards(headers, slots, failures, layout), buffer

    def _load(self, given: Iterator[Tensor], version: int) -> None:
        parameters: list[Tensor] = list(self._compute.parameters)
        with torch.no_grad():
            torch._foreach_copy_(parameters, [next(given) for _ in parameters])
        self._compute.version = version

    def _keep(self, one: JointPass) -> None:
        """Keep a pass by its number, without its graph where this device has no room for it."""
        held = sum(
            other.activation.num_bytes
            for other in self._passes.values()
            if other.activation.output is not None
        )
        if held + one.activation.num_bytes > self._graph_bytes:
            _drop_graph(one)
        self._passes[self._next] = one
        self._next += 1

    def _backward(self, order: BackwardOrder, tensors: list[Tensor]) -> tuple[Reply, Tensor]:
        given = {
            slot: Given(grad, denominator)
            for (slot, denominator), grad in zip(order.denominators.items(), tensors, strict=True)
        }
        made = self._joint.backward([self._passes[number] for number in order.passes], given)
        slots = tuple(sorted(made.smashed_grads))
        smashed = [made.smashed_grads[slot] for slot in slots]
        headers, gradients = _gradients(made.gradients)
        layout, buffer = pack([*smashed, *gradients], self._group.device)
        failures = {slot: Failure.of(error) for slot, error in made.failures.items()}
        return Backwards(headers, slots, failures, made.norms_squared, layout), buffer

    def _again(self, order: AgainOrder) -> tuple[Reply, Tensor]:
        made = self._joint.again(self._passes[order.number], set(order.slots))
        headers, gradients = _gradients(made)
        layout, buffer = pack(gradients, self._group.device)
        return Backwards(headers, (), {}, {}, layout), buffer


def _header(number: int, one: JointPass) -> PassHeader:
    activation = one.activation
    return PassHeader(
        number=number,
        cuts=one.cuts,
        rows=one.rows,
        shape=tuple(activation.hidden.shape),
        num_bytes=activation.num_bytes,
        has_graph=activation.output is not None,
    )


def _drop_graph(one: JointPass) -> None:
    one.activation.output = None
    one.activation.hidden = one.activation.hidden.detach()


def _gradients(
    given: Sequence[PassGradient],
) -> tuple[tuple[GradientHeader, ...], list[Tensor]]:
    """Return what each pass gives, and the gradients that are there, pass after pass."""
    headers = tuple(
        GradientHeader(one.cuts, one.unit, tuple(g is not None for g in one.gradients))
        for one in given
    )
    return headers, [g for one in given for g in one.gradients if g is not None]
