"""What computes joint passes: one device's :class:`JointCompute`, or one that divides them over several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from flower_split.trunk.compute.joining import Part
from flower_split.trunk.compute.joint_pass import (
    Backwarded,
    Forwarded,
    Given,
    JointCompute,
    JointPass,
    PassGradient,
)


class Joint(Protocol):
    """Forward and backward of micro-batch k of all clients of a window; the compute thread calls it."""

    def forward(
        self, parts: Sequence[Part], seed_of: str, keep: Callable[[JointPass], None]
    ) -> Forwarded:
        """See :meth:`JointCompute.forward`."""

    def backward(self, passes: Sequence[JointPass], given: Mapping[int, Given]) -> Backwarded:
        """See :meth:`JointCompute.backward`."""

    def again(self, one: JointPass, slots: set[int]) -> list[PassGradient]:
        """See :meth:`JointCompute.again`."""


class Divider(Protocol):
    """Divides joint passes over several devices, where there are several."""

    def divided(self, local: JointCompute, *, takes_mask: bool) -> Joint:
        """Return what computes a share of every batch with ``local`` and the rest elsewhere.

        The engine calls it once, before it serves.

        Args:
            local: Of this process's device.
            takes_mask: Whether the model takes a padding mask.
        """
