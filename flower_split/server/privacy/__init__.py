"""Differential privacy: mechanisms of Flower, and their accounting.

Runs on: The ServerApp's process.
Read first: ``mechanisms.py``.
"""
