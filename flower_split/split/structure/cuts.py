"""Where a model is cut, and the rule its cut layers must keep."""

import re
from dataclasses import dataclass

from flower_split.errors import SplitError


@dataclass(frozen=True, slots=True)
class CutLayers:
    """The two cut layers: bottom ``[0, first)``, trunk ``[first, second)``, top the rest.

    The embeddings belong to the bottom, the final norm and the head to the top.
    """

    first: int  # index of the trunk's first layer, from 0
    second: int  # index of the top's first layer; the number of layers if the top has none

    def __post_init__(self) -> None:
        """Check the part of the rule that needs no model.

        Raises:
            SplitError: A cut is negative, or the trunk would have no layer.
        """
        if not 0 <= self.first < self.second:
            raise SplitError(
                f"cut layers must satisfy 0 <= first < second, so that the trunk has a layer; "
                f"they are first={self.first} and second={self.second}."
            )

    def __str__(self) -> str:
        """Return ``first:second``, as :meth:`parse` reads it."""
        return f"{self.first}:{self.second}"

    @classmethod
    def parse(cls, text: str) -> "CutLayers":
        """Read ``first:second``.

        Raises:
            SplitError: It does not read so, or the numbers are no cut layers.
        """
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None:
            raise SplitError(
                f'cut layers are written first:second, such as "3:5"; {text!r} is not.'
            )
        return cls(int(match[1]), int(match[2]))

    def holds(self, cuts: "CutLayers") -> bool:
        """Return whether a trunk with these cut layers holds all layers between ``cuts``."""
        return self.first <= cuts.first and cuts.second <= self.second

    def check(self, num_layers: int, model_name: str) -> None:
        """Check that the cuts fit a model of ``num_layers`` layers.

        Raises:
            SplitError: ``second`` lies beyond the last layer.
        """
        if self.second > num_layers:
            raise SplitError(
                f"{model_name} has {num_layers} layers, so the cut layers must satisfy "
                f"0 <= first < second <= {num_layers}; they are first={self.first} and "
                f"second={self.second}."
            )

    def part_of(self, layer: int) -> str:
        """Return the part that owns layer ``layer``: ``"bottom"``, ``"trunk"`` or ``"top"``."""
        if layer < self.first:
            return "bottom"
        return "trunk" if layer < self.second else "top"
