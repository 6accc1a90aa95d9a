"""The trunk's layers divided over further devices, which compute every call together.

Runs on: The trunk; one process leads and serves, the others follow it.
Read first: ``trunk.py``, then ``follower.py``.
"""
