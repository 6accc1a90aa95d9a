"""The trunk's gRPC shell: listen, authenticate, answer.

Runs on: The trunk.
Read first: ``server.py``.
"""
