"""A follower: it computes every call together with the leader, on its share of the layers.

It decides nothing: weights, dropout masks, and what stays in memory follow from the leader's orders.
"""

import logging

import torch
from torch import Tensor

from flower_split.trunk.replicas.group import LEADER, ReplicaGroup
from flower_split.trunk.replicas.orders import (
    Broken,
    CallBackOrder,
    Called,
    CalledBack,
    CallOrder,
    Reply,
)
from flower_split.trunk.replicas.packing import length_of, pack, unpack
from flower_split.trunk.tensor_parallel.shards import LocalCall, Shards

logger = logging.getLogger(__name__)


class ParallelFollower:
    """Answers orders, one after the other.

    Args:
        shards: This process's share.
        group: Where the orders' tensors come from.
    """

    def __init__(self, shards: Shards, group: ReplicaGroup) -> None:
        self._shards = shards
        self._group = group
        self._calls: dict[int, LocalCall] = {}
        device = shards.device
        self._cuda = [device] if device.type == "cuda" else []

    def answer(self, order: CallOrder | CallBackOrder) -> tuple[Reply, Tensor | None]:
        """Carry an order out; return the reply, and the bytes that follow it."""
        tensors = unpack(order.layout, self._group.receive(length_of(order.layout), LEADER))
        try:
            if isinstance(order, CallOrder):
                return self._forward(order, tensors)
            return self._backward(order, tensors[0])
        except Exception as error:
            logger.exception("an order failed")
            return Broken(f"{type(error).__name__}: {error}"), None

    def send(self, buffer: Tensor) -> None:
        """Send the leader the bytes that follow a reply."""
        self._group.send(buffer, LEADER)

    def _forward(self, order: CallOrder, tensors: list[Tensor]) -> tuple[Reply, None]:
        self._calls = {n: call for n, call in self._calls.items() if n in order.alive}
        if order.weights:
            count = len(self._shards.names)
            self._shards.take(tensors[:count])
            tensors = tensors[count:]
        inputs = dict(zip(order.names, tensors, strict=True))
        with torch.random.fork_rng(devices=self._cuda):
            torch.manual_seed(order.seed)
            call = self._shards.call(
                inputs, order.use_cache, training=order.training, graph=order.graph
            )
        if order.graph:
            self._calls[order.number] = call
        return Called(), None

    def _backward(self, order: CallBackOrder, grad: Tensor) -> tuple[Reply, Tensor]:
        _, gradients = self._calls.pop(order.number).backward(grad)
        mine = [g for g, d in zip(gradients, self._shards.divided, strict=True) if d is not None]
        present = tuple(gradient is not None for gradient in mine)
        layout, buffer = pack([g for g in mine if g is not None], self._group.device)
        return CalledBack(present, layout), buffer
