"""Several clients' micro-batches as the rows of one batch, and back.

Rows are in the order of slots. Shorter sequences are padded on the right to the longest, with the
padding mask 0 there, and lose the padding again. Micro-batches that differ in more than their rows and
lengths (own cut layers, whole masks, arguments that a client makes for the layers) go into passes of
their own, and so do lengths that are too far apart: a pass has at most ``MAX_PADDED`` times the
positions that its clients sent. Nor has a pass more positions than it may, but for one micro-batch that
has more by itself: which passes there are depends on what was sent alone.

Shapes: hidden states ``[rows, positions, hidden]``; padding mask ``[rows, positions]``; position ids
``[rows or 1, positions]``, with an axis before them where the model has several.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flower_split.split import CutLayers
from flower_split.trunk.compute.checks import HIDDEN, MASK, POSITIONS

MAX_PADDED = 1.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """One slot's micro-batch."""

    slot: int
    tensors: Mapping[str, Tensor]  # ``hidden_states``, and what TrunkInputs names
    use_cache: bool | None = None  # as the model's own argument
    cuts: CutLayers | None = None  # the client's own; None: the trunk's

    @property
    def hidden(self) -> Tensor:
        """Return the smashed data."""
        return self.tensors[HIDDEN]

    @property
    def num_positions(self) -> int:
        """Return rows times positions."""
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a slot's rows are in a pass."""

    slot: int
    first: int
    count: int
    positions: int
    dtype: torch.dtype  # in which its client sends and receives

    def of(self, joined: Tensor) -> Tensor:
        """Return the slot's part of ``joined``, without padding; a view."""
        return joined[self.first : self.first + self.count, : self.positions]


def passes_of(parts: Sequence[Part], *, takes_mask: bool, max_positions: int) -> list[list[Part]]:
    """Return which micro-batches go together, each list in slot order, the lists by their first slot.

    Args:
        parts: One per slot.
        takes_mask: Whether the model takes a padding mask, without which nothing can be padded.
        max_positions: Rows times positions of a pass, with padding.
    """
    kinds: dict[Hashable, list[Part]] = {}
    for part in sorted(parts, key=lambda item: item.slot):
        kinds.setdefault(_kind(part, takes_mask), []).append(part)
    found = [group for same in kinds.values() for group in _by_length(same, max_positions)]
    return sorted(found, key=lambda group: group[0].slot)


def rows_of(parts: Sequence[Part]) -> tuple[Rows, ...]:
    """Return where each micro-batch is in the pass of all of them."""
    found, first = [], 0
    for part in parts:
        count, positions = part.hidden.shape[:2]
        found.append(Rows(part.slot, first, count, positions, part.hidden.dtype))
        first += count
    return tuple(found)


def joined(parts: Sequence[Part], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a pass of ``parts``, which go together; of one part, its own.

    Args:
        parts: In slot order.
        device: Where the hidden states are joined.
        dtype: The dtype of the joined hidden states.
    """
    longest = max(part.hidden.shape[1] for part in parts)
    result = {
        HIDDEN: torch.cat([_padded(part.hidden.to(device, dtype), 1, longest) for part in parts])
    }
    uneven = any(part.hidden.shape[1] != longest for part in parts)
    if uneven or any(MASK in part.tensors for part in parts):
        masks = [part.tensors.get(MASK) for part in parts]
        result[MASK] = torch.cat(
            [
                _padded(_mask(mask, part), 1, longest)
                for mask, part in zip(masks, parts, strict=True)
            ]
        )
    if POSITIONS in parts[0].tensors:
        ids = [_whole(part.tensors[POSITIONS], part.hidden.shape[0]) for part in parts]
        result[POSITIONS] = torch.cat([_padded(one, -1, longest) for one in ids], dim=-2)
    if len(parts) == 1:  # whatever else it has; what is joined has nothing else
        result |= {name: t for name, t in parts[0].tensors.items() if name not in result}
    return result


def _kind(part: Part, takes_mask: bool) -> Hashable:
    """Return what micro-batches have in common that can be one batch."""
    mask, ids = part.tensors.get(MASK), part.tensors.get(POSITIONS)
    other = part.tensors.keys() - {HIDDEN, MASK, POSITIONS}
    plain_mask = mask is None or (mask.ndim == 2 and not mask.is_floating_point())
    alone = bool(other) or not plain_mask
    return (
        part.cuts,
        part.use_cache,
        None if ids is None else (ids.ndim, ids.dtype, ids.shape[:-2]),
        None if takes_mask else part.hidden.shape[1],
        part.slot if alone else None,
    )


def _by_length(parts: Sequence[Part], max_positions: int) -> list[list[Part]]:
    """Return the parts in groups of like lengths that are not too large, each in slot order."""
    groups: list[list[Part]] = []
    rows = positions = 0
    for part in sorted(parts, key=lambda item: (item.hidden.shape[1], item.slot)):
        rows, positions = rows + part.hidden.shape[0], positions + part.num_positions
        if not groups or rows * part.hidden.shape[1] > min(MAX_PADDED * positions, max_positions):
            groups.append([])
            rows, positions = part.hidden.shape[0], part.num_positions
        groups[-1].append(part)
    return [sorted(group, key=lambda item: item.slot) for group in groups]


def _mask(mask: Tensor | None, part: Part) -> Tensor:
    if mask is None:
        return torch.ones(part.hidden.shape[:2], dtype=torch.int64)
    return mask.to(torch.int64)


def _whole(ids: Tensor, rows: int) -> Tensor:
    """Return position ids with a row for each row of the hidden states."""
    return ids.expand(*ids.shape[:-2], rows, ids.shape[-1])


def _padded(tensor: Tensor, axis: int, length: int) -> Tensor:
    """Return ``tensor`` with zeros after its end along ``axis``."""
    missing = length - tensor.shape[axis]
    if missing == 0:
        return tensor
    axes_after = (tensor.ndim - 1 - axis) if axis >= 0 else -1 - axis
    return functional.pad(tensor, (0, 0) * axes_after + (0, missing))
