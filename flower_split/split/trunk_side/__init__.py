"""The trunk's model: the layers between the cuts.

Runs on: The trunk.
Read first: ``model.py``.
"""
