"""The self-check that refuses models which cannot be split.

Runs on: Any machine that splits or loads a model.
Read first: ``self_check.py``.
"""
