"""The client's model: bottom and top around a trunk that is elsewhere.

Runs on: Clients.
Read first: ``model.py``.
"""
