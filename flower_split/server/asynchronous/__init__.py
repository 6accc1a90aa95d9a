"""Asynchronous rounds: clients at work in different versions of the weights.

Runs on: The ServerApp's process.
Read first: ``loop.py``.
"""
