"""Who holds, trains and must agree on what: pure functions of the run configuration.

Runs on: All three machines.
Read first: ``parts.py``: which part belongs to whom.
"""
