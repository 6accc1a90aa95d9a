"""Aggregation methods, one module each, named after its paper.

Runs on: The ServerApp's process; values only.
Read first: ``registry.py``: names; then ``fedit.py``, the shortest method.
"""
