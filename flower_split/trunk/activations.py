"""What the trunk keeps between a micro-batch's forward and its backward, within a byte budget.

``graph`` keeps the autograd graph. Where that would pass the budget, ``recompute`` keeps only the
inputs and runs the forward again, with the same weights version and dropout seed, so that the
gradient is the same. Where even the inputs do not fit, the call is refused: nothing is evicted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.errors import RefusalReason, TrunkRefused

Key = tuple[int, int, int]  # slot, window, micro-batch


@dataclass(slots=True)
class Activation:
    """One micro-batch between forward and backward."""

    version: int
    num_bytes: int
    hidden: Tensor  # the leaf that receives smashed_grad
    output: Tensor | None  # trunk_output with its graph; None: recompute
    recompute: Callable[[Tensor], Tensor]


class SavedBytes:
    """Counts the bytes that autograd saves inside the context, parameters excluded."""

    def __init__(self, parameters: set[int]) -> None:
        self._seen = set(parameters)
        self.num_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


class ActivationCache:
    """Activations by key, in at most ``budget`` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_bytes = 0
        self._entries: dict[Key, Activation] = {}

    def put(self, key: Key, activation: Activation) -> None:
        """Keep ``activation``, without its graph if the graph does not fit.

        Raises:
            TrunkRefused: Not even its input fits (OVER_BUDGET).
        """
        if self.num_bytes + activation.num_bytes > self.budget:
            activation.output = None
            activation.hidden = activation.hidden.detach()
            activation.num_bytes = activation.hidden.nbytes
        if self.num_bytes + activation.num_bytes > self.budget:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"the trunk keeps {self.num_bytes} bytes of activations of a budget of {self.budget}, "
                f"and this micro-batch needs {activation.num_bytes} more even without its graph. Raise "
                "trunk.activation-memory, or lower train.batch-size or "
                "train.micro-batches-in-flight.",
            )
        self.num_bytes += activation.num_bytes
        self._entries[key] = activation

    def get(self, key: Key) -> Activation | None:
        """The activation of ``key``, which stays."""
        return self._entries.get(key)

    def release(self, key: Key) -> None:
        """Its backward is done."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes

    def release_slot(self, slot: int) -> None:
        """A client has left: free all that it left behind."""
        for key in [key for key in self._entries if key[0] == slot]:
            self.release(key)

    def release_before(self, window: int) -> None:
        """The weights have stepped: what earlier windows left behind can never be used."""
        for key in [key for key in self._entries if key[1] < window]:
            self.release(key)

    def clear(self) -> None:
        """The round is over."""
        self._entries.clear()
        self.num_bytes = 0
