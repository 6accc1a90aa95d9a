"""Experiments: one configuration with others beside it, over seeds, as a table with deviations.

Runs on: One machine, each run in processes forked from one.
Read first: ``sweep.py``: which runs there are, and how they are made, or found finished.
"""
