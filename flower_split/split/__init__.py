"""Splitting: the same model with another party's layers left out, at their original indices.

Runs on clients and on the trunk machine. Begin with ``structure/stack`` (where the layers are) and
``client_side/model`` (what replaces them: in ``trunk_slot`` the layer that calls the trunk, and those
that pass by), then ``trunk_side/model``; ``loading`` reads one party's weights, ``checking`` compares.
"""

from flower_split.split.client_side.model import set_trunk
from flower_split.split.client_side.trunk_slot import TrunkSlot
from flower_split.split.in_memory import split_model
from flower_split.split.loading.parts import load_client_model, load_trunk_model, load_whole_model
from flower_split.split.structure.cuts import CutLayers
from flower_split.split.trunk_side.model import TrunkModel

__all__ = [
    "CutLayers",
    "TrunkModel",
    "TrunkSlot",
    "load_client_model",
    "load_trunk_model",
    "load_whole_model",
    "set_trunk",
    "split_model",
]
