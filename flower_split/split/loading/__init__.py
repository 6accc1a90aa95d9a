"""Checkpoints read by one party: owned tensors only.

Runs on: Clients and the trunk.
Read first: ``parts.py``: the loaders.
"""
