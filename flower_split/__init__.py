"""Federated split fine-tuning of transformers on Flower.

The package root imports nothing heavy; import what you need from its modules, for example
``from flower_split.split import CutLayers, split_model``.
"""

__version__ = "0.1.0"
