"""Where a model's layers are, and what its forward hands to them.

Runs on: Any machine that splits or loads a model.
Read first: ``cuts.py`` and ``stack.py``.
"""
