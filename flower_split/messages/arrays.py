"""Adapters on their way through Flower: fp32 tensors, sorted by name, in one ArrayRecord."""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flower_split.errors import FederationError


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return ``state`` as Flower's record, sorted by name, in fp32."""
    return ArrayRecord(
        {name: Array(state[name].detach().float().cpu().numpy()) for name in sorted(state)}
    )


def check_readable(arrays: ArrayRecord, what: str) -> None:
    """Check that every array of a peer's record can be read.

    Raises:
        FederationError: One cannot: it is no serialised NumPy array, or is cut off.
    """
    for name, array in arrays.items():
        try:
            array.numpy()
        except (TypeError, ValueError, EOFError, OSError, MemoryError) as error:
            raise FederationError(
                f"array {name!r} of {what} cannot be read: {error}. Run the same version of "
                "flower_split on every machine."
            ) from error


def from_arrays(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, sorted by name; they own their memory."""
    return {name: torch.tensor(arrays[name].numpy()) for name in sorted(arrays)}
