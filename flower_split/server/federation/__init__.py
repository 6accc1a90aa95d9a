"""Nodes, exchanges of messages, the handshake, base values.

Runs on: The ServerApp's process.
Read first: ``exchange.py``: push, wait with a deadline, say what failed.
"""
