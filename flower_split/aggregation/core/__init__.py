"""What every aggregation method is made of: factors, low-rank algebra, layouts, checks.

Runs on: The ServerApp's process; values only.
Read first: ``method.py``: the interface that every method implements.
"""
