"""The trunk's protocol as values.

Runs on: Clients, the ServerApp and the trunk.
Read first: ``values.py``: plans, grants, keys, reports.
"""
