"""Splitting: the same model with another party's layers left out, at their original indices."""

from flower_split.split.client_model import TrunkSlot, set_trunk
from flower_split.split.cuts import CutLayers
from flower_split.split.load import load_client_model, load_trunk_model, load_whole_model
from flower_split.split.splitting import split_model
from flower_split.split.trunk_model import TrunkModel

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
