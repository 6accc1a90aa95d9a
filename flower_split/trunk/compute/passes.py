"""What one pass through the trunk's layers is made with, so that it can be made again."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flower_split.split import CutLayers
from flower_split.trunk.compute.weight_versions import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass through the trunk's layers, but for its hidden states: what a recomputation repeats."""

    extras: Mapping[str, Tensor]  # of the call, as they came: what TrunkInputs names
    seed_of: str  # names the micro-batch for its dropout mask; empty: no dropout
    use_cache: bool | None
    cuts: CutLayers | None
    weights: Weights | None = None
