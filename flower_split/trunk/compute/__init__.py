"""The trunk's arithmetic: forward, backward, optimizer step.

Runs on: The trunk; one thread.
Read first: ``compute.py``.
"""
