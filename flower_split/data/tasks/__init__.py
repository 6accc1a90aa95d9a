"""Tasks as the data sees them, one in each module: what a record says, and what is learned of it.

Runs on: Clients.
Read first: ``task.py``: the protocol; then ``classification.py``.
"""
