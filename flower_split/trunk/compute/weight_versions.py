"""The trunk's trainable weights at several versions, for clients that are still at work on an old one.

In an asynchronous round the optimizer steps while clients are between their forwards and backwards.
Each of them computes with the weights it began with, so these are kept, as copies that never change,
until nobody needs them any more. Only LoRA is copied where only LoRA trains; the copies have a byte
budget.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from flower_split.errors import RefusalReason, TrunkRefused


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The trainable parameters at one version; never written to."""

    version: int
    parameters: tuple[nn.Parameter, ...]  # in the order of the trunk's own

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def storages(self) -> set[int]:
        """Addresses of their memory."""
        return {parameter.untyped_storage().data_ptr() for parameter in self.parameters}


class ParameterSlots:
    """Where a module keeps its trainable parameters, so that copies can stand in for them.

    Args:
        module: The trunk; its layers may be shared with others, which see the copies too.
        parameters: Those of it that train.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        order = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._own = tuple(parameters)
        self._slots = [
            (owner, name, order[id(parameter)])
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in order  # a weight that layers share has several slots
        ]

    @contextmanager
    def holding(self, weights: Weights | None) -> Iterator[None]:
        """Compute with ``weights`` inside the block; None: with the module's own."""
        if weights is None:
            yield
            return
        try:
            self._put(weights.parameters)
            yield
        finally:
            self._put(self._own)

    def _put(self, parameters: Sequence[nn.Parameter]) -> None:
        for owner, name, index in self._slots:
            owner._parameters[name] = parameters[index]


class Versions:
    """Copies by version, within a byte budget. Only the compute thread calls it.

    Args:
        budget: Bytes of all copies.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._copies: dict[int, Weights] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(weights.num_bytes for weights in self._copies.values())

    @property
    def held(self) -> list[int]:
        """The versions that are kept, ascending."""
        return sorted(self._copies)

    def copy_of(self, version: int, parameters: Sequence[nn.Parameter]) -> Weights:
        """Return the copy of the current weights, made once for each version.

        Args:
            version: Version of the weights as they are now.
            parameters: The trunk's own.

        Raises:
            TrunkRefused: It does not fit (OVER_BUDGET); nothing is dropped for it.
        """
        known = self._copies.get(version)
        if known is not None:
            return known
        needed = sum(parameter.nbytes for parameter in parameters)
        if self.num_bytes + needed > self.budget:
            raise TrunkRefused(
                RefusalReason.OVER_BUDGET,
                f"clients are at work with versions {self.held} of the trunk's weights, "
                f"{self.num_bytes} bytes of {self.budget}; version {version} needs {needed} more. "
                "Raise trunk.snapshot-memory, or lower strategy.max-staleness or "
                "strategy.concurrency.",
            )
        with torch.no_grad():
            copies = tuple(nn.Parameter(parameter.detach().clone()) for parameter in parameters)
        self._copies[version] = Weights(version, copies)
        return self._copies[version]

    def keep_only(self, versions: set[int]) -> None:
        """Forget the copies of all other versions."""
        for version in [version for version in self._copies if version not in versions]:
            del self._copies[version]
