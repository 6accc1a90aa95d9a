"""Copies of the trunk's layers on further devices, which compute a share of every window batch.

Runs on: The trunk; one process leads and serves, the others follow it.
Read first: ``divided.py``, then ``follower.py``.
"""
