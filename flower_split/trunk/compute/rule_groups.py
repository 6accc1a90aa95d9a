"""The slots' gradients of a window as the strategy's rules take them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from flower_split.aggregation.core.client_updates import ClientUpdate

if TYPE_CHECKING:  # gradients.py reduces by rules
    from flower_split.trunk.compute.gradients import SlotGradient


def groups_of(slots: Mapping[int, "SlotGradient"]) -> dict[tuple[int, ...], list[int]]:
    """Group the parameters that one of them has a gradient of by the slots that pass through them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(next(iter(slots.values())).total)):
        members = tuple(slot for slot in sorted(slots) if slots[slot].passes(index))
        if any(slots[slot].total[index] is not None for slot in members):
            groups.setdefault(members, []).append(index)
    return groups


def as_clients(slots: Mapping[int, "SlotGradient"], names: Sequence[int]) -> list[ClientUpdate]:
    """Return the slots' token-mean gradients as the rules take them: changes from zero, in fp64.

    Args:
        slots: Slot -> its gradient.
        names: The parameters to look at; of each, some slot has a gradient.
    """
    shapes = {
        index: next(g.total[index] for g in slots.values() if g.total[index] is not None)
        for index in names
    }
    clients = []
    for slot, gradient in slots.items():
        scale = gradient.denominator / gradient.num_tokens
        others = {}
        for index in names:
            like, mine = shapes[index], gradient.total[index]
            assert like is not None
            zero = torch.zeros_like(like, dtype=torch.float64)
            others[str(index)] = (zero, zero if mine is None else mine.double() * scale)
        clients.append(ClientUpdate(slot, gradient.num_tokens, {}, others))
    return clients
