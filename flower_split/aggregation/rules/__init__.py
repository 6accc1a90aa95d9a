"""What happens to updates before any method: clipping, robust choice, staleness, DoRA.

Runs on: The ServerApp's process; values only.
Read first: ``rule.py``: the interface.
"""
