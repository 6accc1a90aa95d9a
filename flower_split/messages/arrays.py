"""Adapters on their way through Flower: fp32 tensors, sorted by name, in one ArrayRecord."""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return ``state`` as Flower's record, sorted by name, in fp32."""
    return ArrayRecord(
        {name: Array(state[name].detach().float().cpu().numpy()) for name in sorted(state)}
    )


def from_arrays(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, sorted by name; they own their memory."""
    return {name: torch.tensor(arrays[name].numpy()) for name in sorted(arrays)}
