"""A node's worker: a process that keeps model, data and device between a node's messages.

Runs on: Clients in a deployment (SuperNodes); a simulation's processes are warm by themselves.
Read first: ``asking.py``: how a ClientApp has its message answered.
"""
