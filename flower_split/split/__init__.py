"""Splitting: the same model with another party's layers left out, at their original indices."""

from flower_split.split.client_side.model import TrunkSlot, set_trunk
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
